"""What the model of the algorithm (``pearl.pace.speed``) says of fixed windows, from what forwards took and how often
drafted tokens held: to stand beside what was measured.

Times are means, as stalls are part of what was measured; they are pooled over all setups, chances over all that
drafted with the model: no curve is fitted to its own point. The model takes tokens to hold independently, with one
chance behind a correction and another behind accepted tokens; text comes in easy and hard stretches, which makes long
windows hold more often than that.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.evaluation.anatomy import Anatomy
from pearl.methods import METHODS, Mode
from pearl.pace.acceptance import Odds
from pearl.pace.curves import Times
from pearl.pace.speed import Situation, tokens_per_second

_LEAST = 3  # forwards of so many rows, for a point of the curve
_CERTAIN = 0.995  # what is left for the formulas of a draft that never failed
_SEQUENCES = 4096.0  # as many rows of the draft take as long as one: steps are those of the rounds that are predicted


@dataclass(frozen=True)
class Forwards:
    """Of one load: while the other model rests, and beside it."""

    alone: Times
    beside: Times

    @classmethod
    def measured(cls, together: Anatomy) -> Forwards | None:
        """None if the target was never measured alone."""
        curves = {where: _curve(together.target_rows, where) for where in ("alone", "beside")}
        steps = {where: statistics.fmean(v) for where, v in together.draft_steps.items() if v}
        if not curves["alone"]:
            return None
        curves["beside"] = curves["beside"] or curves["alone"]
        alone, beside = (_times(curves[where], steps.get(where)) for where in ("alone", "beside"))
        return cls(alone, beside)


def _curve(rows: Mapping[str, Sequence[float]], where: str) -> list[tuple[float, float]]:
    """Ascending in both: a forward of more rows does not take less, however it was measured."""
    points: list[tuple[float, float]] = []
    names = [name for name, times in rows.items() if name.startswith(where) and len(times) >= _LEAST]
    for name in sorted(names, key=lambda name: int(name.split()[1])):
        seconds = statistics.fmean(rows[name])
        points.append((float(name.split()[1]), max([seconds, *(y for _, y in points[-1:])])))
    return points


def _times(curve: Sequence[tuple[float, float]], step: float | None) -> Times:
    (x0, y0), (x1, y1) = curve[0], curve[-1]
    slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
    return Times(tuple(curve), slope, ((1.0, step or 0.0), (_SEQUENCES, step or 0.0)))


def odds_of(together: Anatomy) -> Odds | None:
    """None if nothing was drafted."""
    if together.acceptance is None or not together.first[0]:
        return None
    first, later = (held / tested if tested else None for tested, held in (together.first, together.later))
    assert first is not None
    return Odds(min(first, _CERTAIN), min(first if later is None else later, _CERTAIN))


def predicted(options: Mapping[str, Any], forwards: Forwards, odds: Odds | None, own: Anatomy) -> float | None:
    """Tokens per second of one request under a setup with these options (``Setup.options``), where the model knows its
    like. ``own``: its overhead, and how often its prepared windows came true.
    """
    mode = _mode(options)
    if mode is None or not own.overheads:
        return None
    window = 1 if mode == "autoregressive" else int(options["window"])
    if odds is None:
        if mode != "autoregressive":
            return None
        odds = Odds(_CERTAIN, _CERTAIN)
    prepared, hits = _prepared(own)
    situation = Situation(
        np.array([odds.first]), np.array([odds.later]), np.array([1.0]), forwards.alone, forwards.beside,
        dict.fromkeys(METHODS, statistics.fmean(own.overheads)),
        prepared=np.array(prepared), hits=np.array(hits),
    )  # fmt: skip
    return float(tokens_per_second(mode, situation, np.array([[float(window)]]))[0])


def _mode(options: Mapping[str, Any]) -> Mode | None:
    if options.get("method") == "autoregressive":
        return "autoregressive"
    if options.get("window", "auto") == "auto" or options.get("draft") == "ngram":
        return None
    if options["method"] == "speculative":
        return "speculative"
    if not options.get("pre_verify", True):
        return "whole-windows"
    return "pearl" if options.get("post_verify", True) else "pre-verify-only"


def _prepared(own: Anatomy) -> tuple[float, float]:
    """Windows that a round prepares, and the chance that a rejection finds its own."""
    prepared, hit = (sum(counts[i] for counts in own.branches.values()) for i in (0, 1))
    rejections = sum(tested - held for tested, held in own.positions)
    return prepared / max(own.rounds, 1), hit / max(rejections, 1)

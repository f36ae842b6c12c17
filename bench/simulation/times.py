"""What forwards took in measured rounds, by rows and by whether the other model worked too; and rounds made of them."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bench.simulation.rounds import PlayedRound
from pearl.pace import MeasuredRound

_LEAST = 12  # rounds of so many rows, for a point of a curve
Points = Mapping[int, Sequence[float]]


@dataclass(frozen=True)
class Curve:
    """Mean seconds by number of rows, interpolated; beyond the last, as steep as from the first to the last."""

    rows: tuple[float, ...]
    seconds: tuple[float, ...]

    @classmethod
    def through(cls, points: Points) -> Curve:
        known = sorted(n for n, found in points.items() if len(found) >= _LEAST) or sorted(points)
        return cls(tuple(map(float, known)), tuple(statistics.fmean(points[n]) for n in known))

    def at(self, rows: float) -> float:
        beyond = max(0.0, rows - self.rows[-1])
        span = self.rows[-1] - self.rows[0]
        slope = (self.seconds[-1] - self.seconds[0]) / span if span else 0.0
        return float(np.interp(rows, self.rows, self.seconds)) + beyond * max(0.0, slope)


@dataclass(frozen=True)
class ForwardTimes:
    """target: of a forward, draft: of a step; each alone and beside the other model."""

    target: Mapping[bool, Curve]
    draft: Mapping[bool, Curve]

    @classmethod
    def of(cls, rounds: Iterable[MeasuredRound]) -> ForwardTimes:
        target: dict[bool, defaultdict[int, list[float]]] = {b: defaultdict(list) for b in (False, True)}
        draft: dict[bool, defaultdict[int, list[float]]] = {b: defaultdict(list) for b in (False, True)}
        for one in rounds:
            beside = one.target_seconds > 0 and one.draft_seconds > 0
            if one.target_seconds:
                target[beside][one.target_rows].append(one.target_seconds)
            if one.draft_seconds:
                draft[beside][one.draft_sequences].append(one.draft_seconds / one.draft_steps)
        return cls(*({b: Curve.through(found[b]) for b in found} for found in (target, draft)))

    def apart(self, free_rows: bool = False) -> ForwardTimes:
        """As on devices of their own: neither is slowed by the other. What a row of the draft adds is as it is beside,
        for alone there never was another one; or nothing, as where a forward waits for its weights.
        """
        ratio = self.draft[False].at(1) / self.draft[True].at(1)
        draft = Curve(self.draft[True].rows, tuple(seconds * ratio for seconds in self.draft[True].seconds))
        if free_rows:
            draft = Curve((1.0,), (self.draft[False].at(1),))
        return ForwardTimes(dict.fromkeys((False, True), self.target[False]), dict.fromkeys((False, True), draft))

    def seconds(self, one: PlayedRound, overhead: float) -> float:
        beside = one.rows > 0 and one.steps > 0
        target = self.target[beside].at(one.rows) if one.rows else 0.0
        draft = one.steps * self.draft[beside].at(one.sequences) if one.steps else 0.0
        return max(target, draft) + overhead


def overhead(rounds: Sequence[MeasuredRound]) -> float:
    """Mean seconds of a round beyond its longer forward."""
    return statistics.fmean(max(0.0, one.seconds - max(one.target_seconds, one.draft_seconds)) for one in rounds)

"""The rounds of one greedy request, played on a traced text by the engine's own rules; nothing is computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bench.simulation.ranks import TracedText
from pearl.engine.odds import MOST_RANKS, Odds, choose
from pearl.messages import Decision


class PlayedRound(NamedTuple):
    """Rows of the target (0: it rests), steps of the draft and sequences in each (0: it rests), tokens committed;
    whether a drafted token failed, and was found prepared."""

    rows: int
    steps: int
    sequences: int
    tokens: int
    rejected: bool = False
    hit: bool = False


def play(method: str, window: int, branches: int, text: TracedText, odds: Odds) -> Iterator[PlayedRound]:
    """``odds``: as the engine has learned them so far; of PEARL's rounds with branches they learn on."""
    if method == "autoregressive":
        return (PlayedRound(1, 0, 0, 1) for _ in text.tokens)
    return _in_turns(window, text) if method == "speculative" else _pearl(window, branches, text, odds)


def _in_turns(window: int, text: TracedText) -> Iterator[PlayedRound]:
    at, length = 0, len(text.tokens)
    while at < length:
        steps = min(window, length - at)
        yield PlayedRound(0, steps, 1, 0)
        held = text.run(at, at + steps)
        rows = min(steps + 1, length - at)
        committed = min(held + 1, rows)
        yield PlayedRound(rows, 0, 0, committed, held < steps)
        at += committed


def _pearl(window: int, branches: int, text: TracedText, odds: Odds) -> Iterator[PlayedRound]:
    at = pending = 0
    length, confidence = len(text.tokens), odds.confidence()
    while at < length:
        remaining = length - at
        steps = min(window, remaining - pending)
        rows = min(pending + 1, remaining)
        known, late = text.drafted[at : at + pending], steps > 0 and rows > pending
        chosen: dict[tuple[int, int], int] = {}
        if branches and steps:
            for _, place, rank in choose([odds.places(known, confidence, False, False, late)], branches):
                ahead = min(window, steps - place.late, remaining - place.held - 1)
                if ahead > 0:
                    chosen[place.held, rank] = ahead
        held = text.run(at, at + rows)
        rejected, found = held < rows, 0
        if rejected:
            wrong = text.drafted[at + held].ranked
            right = text.tokens[at + held]
            ranks = wrong.tokens[: min(branches, MOST_RANKS)] if wrong is not None else ()
            found = chosen.get((held, ranks.index(right)), 0) if right in ranks else 0
        if branches:
            tested = tuple(d.token for d in text.drafted[at : at + rows])
            decision = Decision(tested, held, text.tokens[at + held] if rejected else None, None)
            odds.observe(text.drafted[at : at + rows], decision, confidence, False)
        committed = held + rejected
        yield PlayedRound(rows, steps, 1 + len(chosen) if steps else 0, committed, rejected, found > 0)
        at, pending = at + committed, found if rejected else max(0, steps - 1)

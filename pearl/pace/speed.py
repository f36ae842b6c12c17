"""Expected tokens per second of each mode at each window; the tests check them against a simulation.

Requests of the same odds are a class. Notation: a window has g tokens; the first token after a correction holds with
probability f, a later one with probability a, independently. C classes, W windows; arrays are ``[W, C]`` or broadcast
to it. ``held(n)`` is the expected number of tokens of n tests with a correction where one fails: the sum of the
chances that the i-th is reached, 1 + f + f a + ... (n terms).

A mode's steady state is a chain of kinds of rounds (first round after a correction, round with a pending window, ...);
a request's share of its rounds in each kind gives its rows and tokens in a round of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pearl.methods import Mode
from pearl.pace.curves import Numbers, Times

_ONE, _NONE = np.array(1.0), np.array(0.0)
_NODES = ((-(3**0.5), 1 / 6), (0.0, 2 / 3), (3**0.5, 1 / 6))  # Gauss-Hermite: a normal number of rows


@dataclass(frozen=True)
class Situation:
    """What the batch is and how long forwards take. first, later, count: ``[C]``, of each class.

    pinned: whether requests are bound to draft all their tokens. overhead: seconds of a round beyond its forwards.
    alone, beside: times of forwards while the other model rests, and while it works. prepared: windows that the draft
    prepares beside its own, of the whole batch, in "pearl"; hits: chance that a rejection finds its window among them;
    one for all, or ``[W]`` and ``[W, 1]``.
    """

    first: Numbers
    later: Numbers
    count: Numbers
    alone: Times
    beside: Times
    overhead: Mapping[Mode, float]
    pinned: bool = False
    prepared: Numbers = field(default_factory=lambda: _NONE)
    hits: Numbers = field(default_factory=lambda: _NONE)

    @property
    def batch(self) -> float:
        return float(self.count.sum())


@dataclass(frozen=True)
class _Kind:
    """A kind of round, of one request: how often (relative), rows, tokens; all ``[W, C]``. drafts: whether it does."""

    weight: Numbers
    rows: Numbers
    tokens: Numbers
    drafts: bool = True


def tokens_per_second(mode: Mode, now: Situation, windows: Numbers) -> Numbers:
    """``[W]``, of the whole batch, for windows ``[W, C]``."""
    return _MODES[mode](now, windows)


def _afresh(now: Situation, tests: Numbers) -> Numbers:
    """That the first token of a fresh window holds where one follows ``tests`` tests: a correction if any of them
    failed, else drafted tokens, after which the target added none of its own.
    """
    f, a = now.first, now.later
    return f / (1 - (a - f) * a ** (tests - 1))


def _held(first: Numbers, later: Numbers, n: Numbers) -> Numbers:
    return np.where(n >= 1, 1 + first * _series(later, n - 1), 0.0)


def _series(a: Numbers, n: Numbers) -> Numbers:
    """1 + a + ... + a^(n-1)."""
    terms: Numbers = (1 - a**n) / (1 - a)
    return terms


def _pearl(now: Situation, g: Numbers) -> Numbers:
    """Rounds with nothing pending test one token; the rounds after it test g, until one fails. After a failure whose
    window was prepared g + 1 are tested, the first of which follows a correction.
    """
    f, a, h = now.first, now.later, now.hits
    one = np.ones_like(g)
    fresh = _Kind((1 - h) * one, one, one)
    going_on = _Kind(f * (1 - h * (1 - a**g)) / (1 - a**g), g, _series(a, g))
    prepared = _Kind(h * one, g + 1, _held(f, a, g + 1))
    return _overlapping("pearl", now, g, [fresh, going_on, prepared] if h.any() else [fresh, going_on], now.prepared)


def _whole_windows(now: Situation, g: Numbers) -> Numbers:
    """A window is drafted while the target rests for that request; then g + 1 tokens are tested, and g as long as all
    hold. With g = 1 each window starts afresh.
    """
    f, a = np.where(g > 1, now.first, _afresh(now, g + 1)), now.later
    one = np.ones_like(g)
    later = np.where(g > 1, f * a**g / (1 - a**g), 0.0)
    first = _Kind(one, g + 1, _held(f, a, g + 1))
    return _overlapping("whole-windows", now, g, [_Kind(one, 0 * g, 0 * g), first, _Kind(later, g, _series(a, g))])


def _pre_verify_only(now: Situation, g: Numbers) -> Numbers:
    f, a = _afresh(now, g) if now.pinned else now.first, now.later
    after = np.where(g > 1, f, 0.0)  # with g = 1 nothing is pending afterwards
    rows = g - now.pinned
    tokens = _series(a, g) - now.pinned * a ** (g - 1)
    one = np.ones_like(g)
    return _overlapping("pre-verify-only", now, g, [_Kind(one, one, one), _Kind(after, rows, tokens, drafts=False)])


def _in_turn(now: Situation, g: Numbers) -> tuple[Numbers, Numbers]:
    """``[W]``: rows and tokens of a verification of whole windows. A token of the target's own follows, or none."""
    f = _afresh(now, g) if now.pinned else now.first
    rows = g + 1 - now.pinned
    return (now.count * rows).sum(1), (now.count * _held(f, now.later, rows)).sum(1)


def _speculative(now: Situation, g: Numbers) -> Numbers:
    rows, tokens = _in_turn(now, g)
    drafting = now.alone.window(g.max(1), np.array(now.batch))
    verifying = now.alone.target(rows)
    rate: Numbers = tokens / (drafting + verifying + 2 * now.overhead["speculative"])
    return rate


def _two_halves(now: Situation, g: Numbers) -> Numbers:
    if now.batch < 2:
        return np.zeros(len(g))
    rows, tokens = _in_turn(now, g)
    drafting = now.beside.window(g.max(1), np.array(now.batch / 2))
    verifying = now.beside.target(rows / 2)
    rate: Numbers = tokens / 2 / (np.maximum(drafting, verifying) + now.overhead["two-halves"])
    return rate


def _autoregressive(now: Situation, g: Numbers) -> Numbers:
    batch = np.array(now.batch)
    if now.pinned:
        seconds = np.maximum(now.beside.target(batch), now.beside.window(_ONE, batch))
    else:
        seconds = now.alone.target(batch)
    return np.full(len(g), now.batch / (seconds + now.overhead["autoregressive"]))


_MODES: dict[Mode, Callable[[Situation, Numbers], Numbers]] = {
    "pearl": _pearl,
    "whole-windows": _whole_windows,
    "pre-verify-only": _pre_verify_only,
    "speculative": _speculative,
    "two-halves": _two_halves,
    "autoregressive": _autoregressive,
}


def _overlapping(mode: Mode, now: Situation, g: Numbers, kinds: Sequence[_Kind], beside: Numbers = _NONE) -> Numbers:
    """Where each request goes its own way through the kinds, and a round lasts as long as its longer forward.

    ``beside``: rows of the draft's batch beside the requests' own.
    """
    weights = np.stack([kind.weight for kind in kinds])
    shares: Numbers = weights / weights.sum(0)  # [kind, W, C]
    tokens = _whole(now, shares, [kind.tokens for kind in kinds])
    if now.batch == 1:
        each = np.stack([_seconds(now, g[:, 0], kind.rows[:, 0], kind.drafts, beside) for kind in kinds])
        seconds: Numbers = (shares[:, :, 0] * each).sum(0)
    else:
        rows = np.stack([kind.rows for kind in kinds])
        mean = (shares * rows).sum(0)
        spread = np.maximum((shares * rows**2).sum(0) - mean**2, 0.0)
        drafting = _whole(now, shares, [np.full_like(g, kind.drafts) for kind in kinds])
        seconds = _round_seconds(
            now,
            now.beside.window(g.max(1), drafting + beside),
            (now.count * mean).sum(1),
            (now.count * spread).sum(1),
        )
    rate: Numbers = tokens / (seconds + now.overhead[mode])
    return rate


def _whole(now: Situation, shares: Numbers, values: Sequence[Numbers]) -> Numbers:
    """``[W]``: of all requests together, the expectation over the kinds."""
    expected: Numbers = (now.count * (shares * np.stack(values)).sum(0)).sum(1)
    return expected


def _round_seconds(now: Situation, drafting: Numbers, rows: Numbers, variance: Numbers) -> Numbers:
    """``[W]``: the expected longer one of drafting and verifying about ``rows`` rows."""
    seconds = np.zeros_like(rows)
    for node, weight in _NODES:
        judged = np.maximum(rows + node * np.sqrt(variance), 1.0)
        seconds += weight * np.maximum(drafting, now.beside.target(judged))
    return seconds


def _seconds(now: Situation, g: Numbers, rows: Numbers, drafts: bool, beside: Numbers) -> Numbers:
    """Of rounds of a request alone: both models at once, or one of them."""
    if not drafts:
        return now.alone.target(rows)
    both = np.maximum(now.beside.window(g, _ONE + beside), now.beside.target(np.maximum(rows, 1.0)))
    return np.where(rows > 0, both, now.alone.window(g, _ONE))

"""How many tokens to draft in a round, and whether to pre-verify, from speeds and acceptance measured while serving.

Measurements are kept for each power-of-two batch size, so the window follows the batch and the context as they change.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

_RECENT_ROUNDS = 32
_FIRST_GUESS = 4
_LEARNING_ROUNDS = 32  # while there are fewer, each one counts; later the window is chosen anew every few rounds
_ROUNDS_BETWEEN_CHOICES = 8


class WindowPolicy(Protocol):
    @property
    def learns(self) -> bool:
        """Whether ``observe`` does anything."""
        ...

    def window(self, batch: int) -> int:
        """Tokens to draft for each request of a batch of that size; at least 1."""
        ...

    def pre_verifies(self, batch: int) -> bool:
        """Whether the first token of a fresh window is verified while the rest is drafted, or all of it afterwards."""
        ...

    def observe(self, measured: MeasuredRound) -> None:
        """Learn from a round without prefill."""
        ...


@dataclass(frozen=True)
class MeasuredRound:
    """Seconds are 0 where a model did not work. ``target_rows``: judged rows per request."""

    batch: int
    draft_steps: int
    draft_seconds: float
    target_rows: float
    target_seconds: float
    tested: int
    accepted: int
    overhead_seconds: float = 0.0  # of the round, beyond the longer of its two forwards


@dataclass(frozen=True)
class FixedWindow:
    size: int
    learns = False

    def window(self, batch: int) -> int:
        return self.size

    def pre_verifies(self, batch: int) -> bool:
        return True

    def observe(self, measured: MeasuredRound) -> None:
        pass


class Speeds(NamedTuple):
    """Seconds. A target forward of n rows a request takes ``target_base + n * target_row``."""

    draft_step: float
    target_base: float
    target_row: float = 0.0
    overhead: float = 0.0

    def target(self, rows: int) -> float:
        return self.target_base + rows * self.target_row


@dataclass
class _Samples:
    draft_step: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_ROUNDS))
    target: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_RECENT_ROUNDS))  # rows, seconds
    overhead: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_ROUNDS))

    @property
    def complete(self) -> bool:
        return bool(self.draft_step and self.target)

    def speeds(self) -> Speeds:
        base, row = _fit_line(self.target)
        return Speeds(statistics.median(self.draft_step), base, row, statistics.median(self.overhead))


class Pace(NamedTuple):
    window: int
    pre_verify: bool = True


Choice = Callable[[Speeds, float, int], Pace]  # speeds, acceptance rate, largest window
TokensPerSecond = Callable[[Speeds, float, int], float]  # speeds, acceptance rate, window


class MeasuredWindow:
    """What ``choose`` takes, windows of 1 to ``largest``, given what was measured."""

    learns = True

    def __init__(self, choose: Choice, largest: int) -> None:
        self._choice, self._largest = choose, largest
        self._samples: defaultdict[int, _Samples] = defaultdict(_Samples)
        self._tested, self._accepted = 0.0, 0.0
        self._rounds = 0
        self._chosen: dict[int, Pace] = {}

    def window(self, batch: int) -> int:
        return self._pace(batch).window

    def pre_verifies(self, batch: int) -> bool:
        """Always for several requests: while one drafts the target works for the others, and one row more is cheap."""
        return batch > 1 or self._pace(batch).pre_verify

    def _pace(self, batch: int) -> Pace:
        size = batch.bit_length()
        if size not in self._chosen:
            self._chosen[size] = self._choose(size)
        return self._chosen[size]

    def observe(self, measured: MeasuredRound) -> None:
        samples = self._samples[measured.batch.bit_length()]
        if measured.draft_steps:
            samples.draft_step.append(measured.draft_seconds / measured.draft_steps)
        if measured.target_seconds:
            samples.target.append((measured.target_rows, measured.target_seconds))
        samples.overhead.append(measured.overhead_seconds)
        self._tested = 0.98 * self._tested + measured.tested
        self._accepted = 0.98 * self._accepted + measured.accepted
        self._rounds += 1
        if self._rounds <= _LEARNING_ROUNDS or self._rounds % _ROUNDS_BETWEEN_CHOICES == 0:
            self._chosen.clear()

    def _choose(self, size: int) -> Pace:
        known = [key for key, samples in self._samples.items() if samples.complete]
        if not known:
            return Pace(min(_FIRST_GUESS, self._largest))
        speeds = self._samples[min(known, key=lambda key: abs(key - size))].speeds()
        acceptance = self._accepted / self._tested if self._tested else 0.8
        acceptance = min(max(acceptance, 0.02), 0.99)
        return self._choice(speeds, acceptance, self._largest)


def balanced_window(speeds: Speeds, acceptance: float, largest: int) -> Pace:
    """PEARL's rule: the smallest g with T_draft(g) >= T_target(k + 1), k = g - 1 pending tokens (section 3.3)."""
    return Pace(next((g for g in range(1, largest) if g * speeds.draft_step >= speeds.target(g)), largest))


def fastest(*, pre_verified: TokensPerSecond | None = None, whole: TokensPerSecond | None = None) -> Choice:
    """The pace with the largest expected speed: of windows whose first token is verified while the rest is drafted, and
    of those that are drafted whole before any of it is verified.
    """
    formulas = [(formula, pre) for formula, pre in ((pre_verified, True), (whole, False)) if formula is not None]

    def choose(speeds: Speeds, acceptance: float, largest: int) -> Pace:
        choices = (
            (formula(speeds, acceptance, g), Pace(g, pre)) for formula, pre in formulas for g in range(1, largest + 1)
        )
        return max(choices, key=lambda choice: choice[0])[1]

    return choose


def pearl_tokens_per_second(speeds: Speeds, acceptance: float, window: int) -> float:
    """Expected speed of PEARL at window g, for one request; a = acceptance.

    It alternates between pre-verify rounds, 1/a of them until the first token of a window holds, and post-verify
    rounds, 1/(1 - a^g) of them until one of g tests fails. The first bring one token each, the second 1/(1 - a)
    together. A round lasts as long as the slower model. Where rows cost the target nothing, the best g is the paper's
    balance, T_draft(g) = T_target (section 3.3); where they do, it is smaller.
    """
    a, drafting = acceptance, window * speeds.draft_step
    pre = max(drafting, speeds.target(1)) + speeds.overhead
    post = max(drafting, speeds.target(window)) + speeds.overhead
    return (1 / a + 1 / (1 - a)) / (pre / a + post / (1 - a**window))


def whole_windows_tokens_per_second(speeds: Speeds, acceptance: float, window: int) -> float:
    """Expected speed of PEARL without pre-verify, for one request.

    After a rejection a window is drafted while the target rests, and brings nothing. The next round tests g + 1 tokens,
    those after it g each, until one fails: 1/(1 - a) tokens together. (With g = 1 each window starts afresh.) Faster
    than pre-verify, in which the target works a whole round for one token, where drafting takes far less time.
    """
    a, drafting = acceptance, window * speeds.draft_step
    dry = drafting + speeds.overhead
    first = max(drafting, speeds.target(window + 1)) + speeds.overhead
    if window == 1:
        return (1 + a) / (dry + first)
    later = max(drafting, speeds.target(window)) + speeds.overhead
    return 1 / (1 - a) / (dry + first + a ** (window + 1) / (1 - a**window) * later)


def sequential_tokens_per_second(speeds: Speeds, acceptance: float, window: int) -> float:
    """Where the models take turns: (1 - a^(g+1)) / (1 - a) tokens in two rounds (Leviathan et al. 2023)."""
    seconds = window * speeds.draft_step + speeds.target(window + 1) + 2 * speeds.overhead
    return (1 - acceptance ** (window + 1)) / (1 - acceptance) / seconds


def _fit_line(samples: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Base and non-negative slope of seconds over rows: least squares over the median time at each number of rows."""
    times: defaultdict[float, list[float]] = defaultdict(list)
    for rows, seconds in samples:
        times[rows].append(seconds)
    points = [(rows, statistics.median(seconds), len(seconds)) for rows, seconds in times.items()]
    total = sum(weight for _, _, weight in points)
    mean_rows = sum(rows * weight for rows, _, weight in points) / total
    mean_seconds = sum(seconds * weight for _, seconds, weight in points) / total
    variance = sum(weight * (rows - mean_rows) ** 2 for rows, _, weight in points)
    covariance = sum(weight * (rows - mean_rows) * (seconds - mean_seconds) for rows, seconds, weight in points)
    slope = max(0.0, covariance / variance) if variance else 0.0
    return max(mean_seconds - slope * mean_rows, 0.0), slope

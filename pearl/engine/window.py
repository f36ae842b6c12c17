"""How many tokens to draft in a round, from speeds and acceptance measured while serving.

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
    def window(self, batch: int) -> int:
        """Tokens to draft for each request of a batch of that size; at least 1."""
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

    def window(self, batch: int) -> int:
        return self.size

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


Choice = Callable[[Speeds, float, int], int]  # speeds, acceptance rate, largest window -> window


class MeasuredWindow:
    """The window that ``choose`` takes, of 1 to ``largest``, given what was measured."""

    def __init__(self, choose: Choice, largest: int) -> None:
        self._choice, self._largest = choose, largest
        self._samples: defaultdict[int, _Samples] = defaultdict(_Samples)
        self._tested, self._accepted = 0.0, 0.0
        self._rounds = 0
        self._chosen: dict[int, int] = {}

    def window(self, batch: int) -> int:
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

    def _choose(self, size: int) -> int:
        known = [key for key, samples in self._samples.items() if samples.complete]
        if not known:
            return min(_FIRST_GUESS, self._largest)
        speeds = self._samples[min(known, key=lambda key: abs(key - size))].speeds()
        acceptance = self._accepted / self._tested if self._tested else 0.8
        acceptance = min(max(acceptance, 0.02), 0.99)
        return self._choice(speeds, acceptance, self._largest)


def balanced_window(speeds: Speeds, acceptance: float, largest: int) -> int:
    """PEARL's rule: the smallest g with T_draft(g) >= T_target(k + 1), k = g - 1 pending tokens (section 3.3)."""
    return next((g for g in range(1, largest) if g * speeds.draft_step >= speeds.target(g)), largest)


def fastest(tokens_per_second: Callable[[Speeds, float, int], float]) -> Choice:
    """The window with the largest expected speed."""

    def choose(speeds: Speeds, acceptance: float, largest: int) -> int:
        return max(range(1, largest + 1), key=lambda g: tokens_per_second(speeds, acceptance, g))

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

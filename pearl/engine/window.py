"""How many tokens to draft in a round, from speeds measured while serving.

Times are medians of recent rounds, kept for each power-of-two batch size, so the window follows the batch and the
context as they change.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

_RECENT_ROUNDS = 15
_FIRST_GUESS = 4


class WindowPolicy(Protocol):
    def window(self, batch: int) -> int:
        """Tokens to draft for each request of a batch of that size; at least 1."""
        ...

    def observe(self, measured: MeasuredRound) -> None:
        """Learn from a round without prefill."""
        ...


@dataclass(frozen=True)
class MeasuredRound:
    """Seconds are 0 where a model did not work."""

    batch: int
    draft_steps: int
    draft_seconds: float
    target_seconds: float
    tested: int
    accepted: int


@dataclass(frozen=True)
class FixedWindow:
    size: int

    def window(self, batch: int) -> int:
        return self.size

    def observe(self, measured: MeasuredRound) -> None:
        pass


@dataclass
class _Speeds:
    draft_step: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_ROUNDS))
    target: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT_ROUNDS))


class MeasuredWindow:
    """Applies ``choose(target_seconds / draft_step_seconds, acceptance_rate)``, clipped to [1, largest]."""

    def __init__(self, choose: Callable[[float, float], int], largest: int) -> None:
        self._choose, self._largest = choose, largest
        self._speeds: defaultdict[int, _Speeds] = defaultdict(_Speeds)
        self._tested, self._accepted = 0.0, 0.0

    def window(self, batch: int) -> int:
        speeds = self._nearest(batch)
        if speeds is None:
            return min(_FIRST_GUESS, self._largest)
        ratio = statistics.median(speeds.target) / statistics.median(speeds.draft_step)
        acceptance = self._accepted / self._tested if self._tested else 0.8
        return max(1, min(self._largest, self._choose(ratio, acceptance)))

    def observe(self, measured: MeasuredRound) -> None:
        speeds = self._speeds[measured.batch.bit_length()]
        if measured.draft_steps:
            speeds.draft_step.append(measured.draft_seconds / measured.draft_steps)
        if measured.target_seconds:
            speeds.target.append(measured.target_seconds)
        self._tested = 0.98 * self._tested + measured.tested
        self._accepted = 0.98 * self._accepted + measured.accepted

    def _nearest(self, batch: int) -> _Speeds | None:
        wanted = batch.bit_length()
        known = [key for key, speeds in self._speeds.items() if speeds.draft_step and speeds.target]
        return self._speeds[min(known, key=lambda key: abs(key - wanted))] if known else None


def balanced_window(ratio: float, acceptance: float) -> int:
    """PEARL: the smallest g with T_draft(g) >= T_target, so that neither model waits (paper, section 3.3)."""
    return math.ceil(ratio)


def best_sequential_window(ratio: float, acceptance: float) -> int:
    """Speculative: the g that maximises expected tokens per second when the models take turns.

    Tokens of a round: (1 - a^(g+1)) / (1 - a); its time in target forwards: g / ratio + 1 (Leviathan et al. 2023).
    """
    a = min(acceptance, 0.999)
    return max(range(1, 65), key=lambda g: (1 - a ** (g + 1)) / (1 - a) / (g / ratio + 1))

"""What the engine wants of a pace, and those that predict nothing: a fixed window, and the paper's balance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pearl.methods import Mode
from pearl.pace.curves import Curves, Sizes
from pearl.pace.rounds import Load, MeasuredRound, Pace


class PacePolicy(Protocol):
    """Belongs to the engine's thread."""

    @property
    def changes(self) -> bool:
        """Whether modes and windows may."""
        ...

    @property
    def listens(self) -> bool:
        """Whether ``observe`` wants to be told of the round that has just ended."""
        ...

    def decide(self, request_ids: Sequence[int], load: Load, pinned: bool) -> Pace:
        """For the requests that run, in order. pinned: whether any of them must draft all its tokens."""
        ...

    def observe(self, measured: MeasuredRound) -> None: ...


@dataclass(frozen=True)
class FixedPace:
    mode: Mode
    window: int
    changes = listens = False

    def decide(self, request_ids: Sequence[int], load: Load, pinned: bool) -> Pace:
        return Pace(self.mode, (self.window,) * len(request_ids))

    def observe(self, measured: MeasuredRound) -> None:
        pass


class PreparingPace:
    """Another pace, with a fixed number of prepared windows."""

    def __init__(self, pace: PacePolicy, branches: int) -> None:
        self._pace, self._branches = pace, branches

    @property
    def changes(self) -> bool:
        return self._pace.changes

    @property
    def listens(self) -> bool:
        return self._pace.listens

    def decide(self, request_ids: Sequence[int], load: Load, pinned: bool) -> Pace:
        return self._pace.decide(request_ids, load, pinned)._replace(branches=self._branches)

    def observe(self, measured: MeasuredRound) -> None:
        self._pace.observe(measured)


class BalancedPace:
    """PEARL's rule: the smallest g with T_draft(g) >= T_target(k + 1), k = g - 1 pending tokens (arXiv 2408.11850,
    section 3.3), with times as they are measured while both models work.
    """

    changes = listens = True

    def __init__(self, mode: Mode, largest: int, sizes: Sizes) -> None:
        self._mode, self._largest = mode, largest
        self._curves = Curves(sizes)

    def decide(self, request_ids: Sequence[int], load: Load, pinned: bool) -> Pace:
        times, windows = self._curves.times(load, beside=True), np.arange(1.0, self._largest)
        covers = times.window(windows, np.array(load.batch)) >= times.target(load.batch * windows)
        window = int(windows[covers][0]) if covers.any() else self._largest
        return Pace(self._mode, (window,) * load.batch)

    def observe(self, measured: MeasuredRound) -> None:
        self._curves.observe(measured)

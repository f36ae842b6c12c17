"""A pace that switches at random: whatever modes and windows follow each other, outputs must not change."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pearl.methods import METHODS, Mode
from pearl.pace import Load, MeasuredRound, Pace


class RandomPace:
    """Another mode every few rounds; in each other windows for each request, and another number of prepared ones."""

    changes = listens = True

    def __init__(self, largest: int, seed: int = 0, modes: Sequence[Mode] = tuple(METHODS)) -> None:
        self._largest, self._rng, self._modes = largest, random.Random(seed), modes
        self._mode, self._left, self._branches = modes[0], 0, random.Random(seed)

    def decide(self, request_ids: Sequence[int], load: Load, pinned: bool) -> Pace:
        if not self._left:
            self._mode, self._left = self._rng.choice(self._modes), self._rng.randint(1, 4)
        self._left -= 1
        longest = 1 if self._mode == "autoregressive" else self._largest
        windows = tuple(self._rng.randint(1, longest) for _ in request_ids)
        return Pace(self._mode, windows, branches=self._branches.choice((0, 1, 5)))

    def observe(self, measured: MeasuredRound) -> None:
        pass

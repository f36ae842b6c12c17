"""Prepared windows chosen at random, good and stupid ones alike: whatever is prepared, outputs must not change."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pearl.engine.odds import MOST_RANKS, Choice, Place


class RandomBranches:
    """A ``Chooser``. It takes what it is allowed, in any order, of late branches also ranks that there may not be."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = random.Random(seed)

    def __call__(self, places: Sequence[Sequence[Place]], most: int) -> list[Choice]:
        every = [
            Choice(request, place, rank)
            for request, own in enumerate(places)
            for place in own
            for rank in range(min(most, MOST_RANKS if place.late else len(place.shares)))
        ]
        return self._rng.sample(every, min(most, len(every)))

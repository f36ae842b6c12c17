"""What is worth running for a moment although another pace is predicted to be faster: what is known of it is old. Times
that were measured long ago, while memory was cold, or in a moment in which the machine was slow, may be off by a half,
and nothing else would correct them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from pearl.methods import Mode
from pearl.pace.search import Choice

_BELIEVED = 128  # rounds for which what was measured is;
_DOUBT = 0.03  # then it may be better by this share, and by as much again each time that it is twice as old
_CATCHING_UP = 8  # rounds, after plain decoding, for each token of a request, which the draft must compute first
_WORTH_A_TRY = 0.25  # by which a mode may be better that was never run
# Plain decoding, whose few rows nothing else has, is always tried, and afterwards may be better by this share too, over
# the square of the number of occasions on which it was run.
_DOUBT_OF_PLAIN = 0.4


class _Run(NamedTuple):
    occasions: int = 0
    until: int = 0


class Looks:
    """Belongs to one pace, which counts the rounds."""

    def __init__(self) -> None:
        self._runs: dict[tuple[int, Mode, int], _Run] = {}  # by size of batch, mode and window

    def note(self, size: int, choice: Choice, until: int) -> None:
        """Batches of that size run it until that round."""
        key = size, choice.mode, choice.longest
        before = self._runs.get(key, _Run())
        again = not before.occasions or until > before.until + _BELIEVED
        self._runs[key] = _Run(before.occasions + again, until)

    def hope_of_mode(self, size: int, choice: Choice, now: int, behind: int) -> float:
        """Tokens per second that the best choice of a mode that does not run might bring; 0 where nothing is to be
        learnt. ``behind``: tokens of a request that the draft must compute first.
        """
        runs = [run for (its, mode, _), run in self._runs.items() if mode == choice.mode and abs(its - size) <= 1]
        if not runs:
            return math.inf if choice.mode == "autoregressive" else choice.rate * (1 + _WORTH_A_TRY)
        age, believed = now - max(run.until for run in runs), max(_BELIEVED, _CATCHING_UP * behind)
        doubt = _DOUBT_OF_PLAIN / max(run.occasions for run in runs) ** 2 if choice.mode == "autoregressive" else 0.0
        return _hope(choice, age / believed, doubt)

    def hope_of_window(self, size: int, choice: Choice, now: int) -> float:
        """Likewise another window of the mode that runs."""
        run = self._runs.get((size, choice.mode, choice.longest), _Run())
        return _hope(choice, (now - run.until) / _BELIEVED)


def _hope(choice: Choice, age: float, doubt: float = 0.0) -> float:
    return choice.rate * (1 + doubt + _DOUBT * math.log2(age)) if age > 1 else 0.0

"""How far predictions of each mode were off: drafters that are often dry, odds that are none of a chain's."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from pearl.methods import Mode

_FORGET = 0.998  # of the rounds before, with each further one
_SCATTER = 1.5  # of the tokens that a request gets in a round, relative: rounds of one run of luck are not independent
_COARSE = 0.03  # what formulas may be off
_LOWEST, _HIGHEST = 0.05, 1.5


@dataclass
class _Sums:
    tokens: float = 0.0
    predicted: float = 0.0
    requests: float = 0.0


class Calibration:
    """Belongs to one pace."""

    def __init__(self) -> None:
        self._sums: defaultdict[Mode, _Sums] = defaultdict(_Sums)

    def observe(self, mode: Mode, tokens: int, seconds: float, predicted_rate: float, batch: int) -> None:
        """A round, whose mode was predicted to give so many tokens per second (before any factor)."""
        sums = self._sums[mode]
        sums.tokens = _FORGET * sums.tokens + tokens
        sums.predicted = _FORGET * sums.predicted + predicted_rate * seconds
        sums.requests = _FORGET * sums.requests + batch

    def factor(self, mode: Mode) -> float:
        """To multiply predictions with: 1 as long as they are within what chance explains."""
        sums = self._sums.get(mode)
        if sums is None or not sums.tokens or not sums.predicted:
            return 1.0
        off = math.log(sums.tokens / sums.predicted)
        chance = _COARSE + 2 * _SCATTER / math.sqrt(sums.requests)
        return min(max(math.exp(math.copysign(max(0.0, abs(off) - chance), off)), _LOWEST), _HIGHEST)

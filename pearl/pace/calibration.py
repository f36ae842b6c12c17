"""How far predictions of each mode were off: drafters that are often dry, odds that are none of a chain's."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from pearl.methods import Mode

_STRETCH = 8  # rounds that are judged together: even, for modes that take turns
_FORGET = 0.992  # of those before, with each further one of any mode: what a mode was once is looked at again
_DOUBT = 250.0  # rounds of a request after which half of what was found is believed: its tokens vary about as much as
# they are, while formulas are seldom off by more than a sixteenth
_CHANCE = 3.0  # relative: of the tokens of a request's round, three standard deviations
_LOWEST, _HIGHEST = 0.05, 1.5


@dataclass
class _Sums:
    tokens: float = 0.0
    predicted: float = 0.0
    requests: float = 0.0

    def forget(self) -> None:
        self.tokens *= _FORGET
        self.predicted *= _FORGET
        self.requests *= _FORGET

    def add(self, tokens: float, predicted: float, requests: float) -> None:
        self.tokens += tokens
        self.predicted += predicted
        self.requests += requests

    @property
    def off(self) -> float:
        """The logarithm of how many times more tokens there were than predicted; 0 if nothing is known."""
        return math.log(self.tokens / self.predicted) if self.tokens and self.predicted else 0.0

    @property
    def believed(self) -> float:
        """As much of ``off`` as has been shown: a part that grows with what was seen; all but chance of a large one."""
        if not self.requests:
            return 0.0
        part = self.requests / (self.requests + _DOUBT) * abs(self.off)
        return math.copysign(max(part, abs(self.off) - _CHANCE / math.sqrt(self.requests)), self.off)


class Stretch:
    """Rounds one after another, judged together: where models take turns, each of two has all the tokens or none."""

    def __init__(self) -> None:
        self._rounds, self._tokens, self._seconds = 0, 0, 0.0

    def add(self, tokens: int, seconds: float) -> tuple[int, float] | None:
        """Another round. Tokens and seconds of all of them, as soon as there are enough."""
        self._rounds, self._tokens, self._seconds = self._rounds + 1, self._tokens + tokens, self._seconds + seconds
        if self._rounds < _STRETCH:
            return None
        found = self._tokens, self._seconds
        self.break_off()
        return found

    def break_off(self) -> None:
        """The next round does not follow: there was one with prompts between, or another choice."""
        self._rounds, self._tokens, self._seconds = 0, 0, 0.0


class Calibration:
    """Belongs to one pace."""

    def __init__(self) -> None:
        # By size of batch: for one request and for several the formulas are others, and so are their faults.
        self._sums: defaultdict[int, defaultdict[Mode, _Sums]] = defaultdict(lambda: defaultdict(_Sums))

    def observe(self, mode: Mode, tokens: int, seconds: float, predicted_rate: float, batch: int) -> None:
        """A stretch of rounds, whose mode was predicted to give so many tokens per second (before any factor)."""
        modes = self._sums[batch.bit_length()]
        for known in modes.values():
            known.forget()
        modes[mode].add(tokens, predicted_rate * seconds, batch * _STRETCH)

    def factor(self, mode: Mode, batch: int) -> float:
        """To multiply predictions with, for batches of that size."""
        known = self._sums[batch.bit_length()].get(mode, _Sums())
        return min(max(math.exp(known.believed), _LOWEST), _HIGHEST)

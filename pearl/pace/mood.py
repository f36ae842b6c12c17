"""How fast the machine is at the moment, and what it usually is: neighbours, clocks and heat change it by a third."""

from __future__ import annotations

import statistics
from collections import deque

_LATELY = 9  # rounds: a mood lasts for more than a few, a stall is none


class Mood:
    """Times that are kept are divided by it, so that those of different moods can be compared: what was measured of one
    mode a minute ago with what is measured of another now. It is learnt from forwards of which enough is known, and
    carried over to those that are new.

    Nothing ties "usual" to a clock: only ratios matter, to each other and to now. But mood and known times must be off
    in the same way. With a mean beside medians, rounds that are long now and then made a mood too slow, what had been
    divided by it too fast, and the mood slower still: what had not run for a thousand rounds looked slow for ever.
    """

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=_LATELY)
        self.factor = 1.0  # how many times longer forwards take than usual

    def observe(self, ratio: float) -> None:
        """How many times longer than usual a round's forwards took."""
        self._ratios.append(ratio)
        self.factor = statistics.median(self._ratios)

    def look_away(self) -> None:
        """Rounds went by of which nothing was heard: the next one tells more than those before."""
        self._ratios.clear()

"""How fast the machine is at the moment, and what it usually is: neighbours, clocks and heat change it by a third."""

from __future__ import annotations

import math

_GAIN = 0.2  # of the latest round: a mood lasts for more than a few
_FADES = 0.002  # a round: known times follow what lasts, within some thousand rounds
_AT_MOST = 0.5  # that one round changes, before the gain: a stall is no mood


class Mood:
    """Times that are kept are divided by it, so that those of different moods can be compared: what was measured of one
    mode a minute ago with what is measured of another now. It is learnt from forwards of which enough is known, and
    carried over to those that are new. Without fading, what is known and the mood would wander off together.
    """

    def __init__(self) -> None:
        self._log = 0.0

    @property
    def factor(self) -> float:
        """How many times longer forwards take than usual."""
        return math.exp(self._log)

    def observe(self, measured: float, usual: float) -> None:
        """The seconds of a round's forwards, and what is known of them, in no mood."""
        off = math.log(measured / usual) - self._log
        self._log += _GAIN * min(max(off, -_AT_MOST), _AT_MOST)

    def fade(self) -> None:
        """A round has gone by."""
        self._log *= 1 - _FADES

"""When drafting is tried again after plain decoding, which tests no drafted token and so learns nothing of texts: a new
request's may be easy although those before were hard, and after a while all may be.
"""

from __future__ import annotations

import math

from pearl.methods import Mode

_ERRORS = 2.0  # standard deviations by which the odds of one request may easily be better than they are thought,
_OUTDATED = 512  # and, after so many rounds of plain decoding, those of all requests together
_PATIENCE, _MOST_PATIENCE = 8, 256  # rounds between the first trial and the second; then twice as many each time
# Coming back, the draft computes all that it lacks. With the bundled pair a token of each request takes 0.01 rounds of
# plain decoding of one request, 0.05 of many: so it takes a fortieth of the time at most.
# (``Looks`` wait longer for the same: they may find some per cent, a trial half as much again.)
_SHARED = 16  # requests among which coming back waits for twice as many rounds


class Hopes:
    """Belongs to one pace, whose rounds are counted by ``now``."""

    def __init__(self) -> None:
        self._drafted = 0  # the latest round that was not plain
        self._tried, self._patience = 0, 0  # the latest trial, and rounds until the next

    def note(self, mode: Mode, now: int) -> None:
        if mode != "autoregressive":
            self._drafted = now

    def renew(self) -> None:
        """All requests are new."""
        self._patience = 0

    def errors(self, batch: int, now: int) -> float:
        """By how many standard deviations of each request's odds all of them may easily be better: chance is less among
        many, but what was tested long ago says little of any.
        """
        return _ERRORS * max(1 / math.sqrt(batch), min((now - self._drafted) / _OUTDATED, 1.0))

    def waits(self, now: int) -> int:
        """Rounds until the next trial."""
        return max(0, self._tried + self._patience - now)

    def allows(self, behind: int, batch: int, now: int) -> bool:
        """Whether there was enough plain decoding since for the draft to compute ``behind`` tokens of each request."""
        return behind * (1 + batch / _SHARED) <= now - self._drafted

    def try_it(self, now: int) -> None:
        self._tried = now
        self._patience = min(max(2 * self._patience, _PATIENCE), _MOST_PATIENCE)

"""How likely drafted tokens hold: for each request, and for the first token after a correction apart from later ones.

Text is easy or hard in stretches: a token after accepted ones holds more often than one after a rejection.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pearl.pace.rounds import Progressed

_FORGET = 0.98  # a request's tests, with each further one
_FORGET_ALL = 0.998
_WEIGHT = 24.0  # tests that all requests' average is worth against a request's own
_FIRST_GUESS = 0.8
_UNTOLD = 4  # tests that a longer window would have made
_LOWEST, _HIGHEST = 0.02, 0.99


class Odds(NamedTuple):
    """That a token holds: the first after a correction, and one after accepted tokens."""

    first: float
    later: float


@dataclass
class _Tests:
    tested: float = 0.0
    held: float = 0.0

    def add(self, tested: int, held: int, forget: float) -> None:
        keep = forget**tested
        self.tested, self.held = keep * self.tested + tested, keep * self.held + held

    def age(self, tests: int, forget: float) -> None:
        """As if so many tests had been made that told nothing."""
        keep = forget**tests
        self.tested, self.held = keep * self.tested, keep * self.held

    def odds(self, prior: float) -> float:
        return min(max((self.held + _WEIGHT * prior) / (self.tested + _WEIGHT), _LOWEST), _HIGHEST)


@dataclass
class _Request:
    first: _Tests = field(default_factory=_Tests)
    later: _Tests = field(default_factory=_Tests)
    corrected: bool = True  # the latest committed token is none that was drafted


class Acceptance:
    """Belongs to one pace."""

    def __init__(self) -> None:
        self._first, self._later = _Tests(), _Tests()
        self._requests: dict[int, _Request] = {}

    def observe(self, requests: Iterable[Progressed]) -> None:
        first, later, untold = [0, 0], [0, 0], 0  # tested and held, of all requests
        for request_id, tested, accepted, committed in requests:
            request = self._requests.get(request_id)
            if not tested:
                if request is not None and committed:  # a token of the target's own
                    request.corrected = True
                continue
            if request is None:
                request = self._requests[request_id] = _Request()
            judged, held = accepted + (accepted < tested), accepted
            if request.corrected:
                one = int(held > 0)
                request.first.add(1, one, _FORGET)
                first[0], first[1] = first[0] + 1, first[1] + one
                judged, held = judged - 1, held - one
                if one and not judged:  # the window was at its end: what would have followed is not known
                    request.later.age(_UNTOLD, _FORGET)
                    untold += _UNTOLD
            if judged:
                request.later.add(judged, held, _FORGET)
                later[0], later[1] = later[0] + judged, later[1] + held
            request.corrected = committed > accepted
        self._first.add(first[0], first[1], _FORGET_ALL)
        self._later.age(untold, _FORGET_ALL)
        self._later.add(later[0], later[1], _FORGET_ALL)

    def odds(self, request_ids: Sequence[int]) -> list[Odds]:
        """And forget the other requests."""
        self._requests = {i: self._requests[i] for i in request_ids if i in self._requests}
        every, known = self.of_a_new_one, self._requests
        return [
            Odds(known[i].first.odds(every.first), known[i].later.odds(every.later)) if i in known else every
            for i in request_ids
        ]

    @property
    def of_a_new_one(self) -> Odds:
        first = self._first.odds(_FIRST_GUESS)
        return Odds(first, self._later.odds(first))

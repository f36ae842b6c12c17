"""How likely drafted tokens hold: for each request, and for the first token after a correction apart from later ones.

Texts differ: where one request's drafts hold in three of four places, another's hold in one of five. So what others
have shown is worth a few tests of a request's own, and counts by requests, not by tests: one long answer tells of one
text. And a text is easy or hard in stretches: a token after accepted ones holds more often than one after a rejection,
and what was tested long ago tells less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from pearl.pace.rounds import Progressed

_FORGET = 0.985  # a request's tests, with each further one,
_FORGET_UNTESTED = 0.995  # and with each round in which none of its tokens is tested
_FORGET_ENDED = 0.95  # requests that have ended, with each further one
_WEIGHT = 8.0  # tests that what other requests have shown is worth against a request's own
_FIRST_GUESS = 0.8
_GUESS_WEIGHT = 0.5  # requests that the guess is worth
_UNTOLD = 4  # tests that a longer window would have made
_LOWEST, _HIGHEST = 0.02, 0.99
_LEAST_VARIED = 0.1  # a chance that is thought smaller is known no better than one of this size


class Odds(NamedTuple):
    """That a token holds: the first after a correction, and one after accepted tokens."""

    first: float
    later: float


@dataclass
class _Tests:
    tested: float = 0.0
    held: float = 0.0

    def add(self, tested: int, held: int) -> None:
        self.age(tested, _FORGET)
        self.tested, self.held = self.tested + tested, self.held + held

    def age(self, times: int, forget: float) -> None:
        keep = forget**times
        self.tested, self.held = keep * self.tested, keep * self.held

    def odds(self, prior: float) -> float:
        return min(max((self.held + _WEIGHT * prior) / (self.tested + _WEIGHT), _LOWEST), _HIGHEST)

    def error(self, odds: float) -> float:
        """The standard deviation of ``odds``, which were found from these tests."""
        likely = max(odds, _LEAST_VARIED)
        return math.sqrt(likely * (1 - likely) / (self.tested + _WEIGHT + 1))


@dataclass
class _Request:
    first: _Tests = field(default_factory=_Tests)
    later: _Tests = field(default_factory=_Tests)
    corrected: bool = True  # the latest committed token is none that was drafted
    round: int = 0  # up to which its tests have aged

    def age(self, now: int) -> None:
        for tests in (self.first, self.later):
            tests.age(now - self.round, _FORGET_UNTESTED)
        self.round = now


@dataclass
class _Shown:
    """What requests have shown together: each counts as far as it had more tests than ``_WEIGHT``."""

    requests: float = 0.0
    held: float = 0.0

    def add(self, tests: _Tests) -> None:
        self.requests += tests.tested / (tests.tested + _WEIGHT)
        self.held += tests.held / (tests.tested + _WEIGHT)

    def fade(self) -> None:
        self.requests, self.held = _FORGET_ENDED * self.requests, _FORGET_ENDED * self.held

    def mean(self, running: Iterable[_Tests], guess: float) -> float:
        """Of these, which have ended, and of those that run."""
        every = replace(self)
        for tests in running:
            every.add(tests)
        share = (every.held + _GUESS_WEIGHT * guess) / (every.requests + _GUESS_WEIGHT)
        return min(max(share, _LOWEST), _HIGHEST)


class Acceptance:
    """Belongs to one pace."""

    def __init__(self) -> None:
        self._first, self._later = _Shown(), _Shown()
        self._requests: dict[int, _Request] = {}

    def observe(self, requests: Iterable[Progressed], now: int) -> None:
        """``now``: a count of rounds."""
        for request_id, tested, accepted, committed in requests:
            request = self._requests.get(request_id)
            if not tested:
                if request is not None and committed:  # a token of the target's own
                    request.corrected = True
                continue
            if request is None:
                request = self._requests[request_id] = _Request(round=now)
            request.age(now)
            judged, held = accepted + (accepted < tested), accepted
            if request.corrected:
                one = int(held > 0)
                request.first.add(1, one)
                judged, held = judged - 1, held - one
                if one and not judged:  # the window was at its end: what would have followed is not known
                    request.later.age(_UNTOLD, _FORGET)
            if judged:
                request.later.add(judged, held)
            request.corrected = committed > accepted

    def odds(self, request_ids: Sequence[int], now: int) -> list[Odds]:
        """And forget the other requests, which have ended."""
        known = self._requests
        for request_id in known.keys() - set(request_ids):
            ended = known.pop(request_id)
            for shown, tests in ((self._first, ended.first), (self._later, ended.later)):
                shown.fade()
                shown.add(tests)
        for request in known.values():
            request.age(now)
        every = self.of_a_new_one
        return [
            Odds(known[i].first.odds(every.first), known[i].later.odds(every.later)) if i in known else every
            for i in request_ids
        ]

    def has_tested(self, request_ids: Iterable[int]) -> bool:
        """Whether tokens of each of them were."""
        return self._requests.keys() >= set(request_ids)

    def hoped(self, request_ids: Sequence[int], odds: Sequence[Odds], errors: float) -> list[Odds]:
        """The same ``odds``, if each is better by so many of its standard deviations."""
        nothing = _Request()
        requests = [self._requests.get(i, nothing) for i in request_ids]
        return [
            Odds(
                min(one.first + errors * request.first.error(one.first), _HIGHEST),
                min(one.later + errors * request.later.error(one.later), _HIGHEST),
            )
            for request, one in zip(requests, odds, strict=True)
        ]

    @property
    def of_a_new_one(self) -> Odds:
        running = self._requests.values()
        first = self._first.mean([request.first for request in running], _FIRST_GUESS)
        return Odds(first, self._later.mean([request.later for request in running], first))

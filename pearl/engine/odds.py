"""Which verdicts are likely: where it ends that drafted tokens hold, and what then stands in the place of the next.

Learned from verdicts. No output depends on it: it says what is worth preparing (docs/algorithm.md).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pearl.messages import Decision, Drafted, Ranked
from pearl_kernels import Rule

MOST_RANKS = 8  # alternatives that are looked at
_PRIOR_SHARES = (0.40, 0.17, 0.10, 0.06, 0.04, 0.03, 0.02, 0.02)  # of the ranks, of the corrections,
_PRIOR_WEIGHT = 20.0  # as many corrections
_FORGET = 0.998  # corrections, with each further one
_RATE, _RATE_ALL = 0.1, 0.01  # how far a test moves a request's log odds, and all requests'
_LEAST, _MOST = 0.002, 0.998  # probabilities of a draft, which is never as sure as it says


@dataclass(slots=True)
class Confidence:
    """Log odds that a request's drafted token holds: in general, and beyond what the draft says of the token."""

    base: float
    bias: float

    def observe(self, held: bool, said: float | None, rate: float) -> None:
        """``said``: the log odds that the draft gave it, where it gave any."""
        self.base += rate * (held - _sigmoid(self.base))
        if said is not None:
            self.bias += rate * (held - _sigmoid(said + self.bias))


class Place(NamedTuple):
    """Where a verdict may end: behind ``held`` tokens."""

    held: int
    chance: float  # that it does
    shares: Sequence[float]  # of the alternatives, best first: that each then follows
    late: bool


class Choice(NamedTuple):
    request: int  # its index
    place: Place
    rank: int


class Odds:
    """Belongs to the engine's thread."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._all = Confidence(0.8, 0.0)
        self._corrections = 0.0
        self._ranks = [0.0] * MOST_RANKS

    def confidence(self) -> Confidence:
        """Of a request of which nothing is known."""
        return Confidence(self._all.base, self._all.bias)

    @property
    def shares(self) -> list[float]:
        """On average: of all corrections, how many were the alternative of each rank."""
        weight = _PRIOR_WEIGHT + self._corrections
        return [(_PRIOR_WEIGHT * p + n) / weight for p, n in zip(_PRIOR_SHARES, self._ranks, strict=True)]

    def places(
        self, pending: Sequence[Drafted], confidence: Confidence, sampled: bool, blind: bool, late: bool
    ) -> list[Place]:
        """Where the verdict about pending tokens may end and, ``late``, about the one that is drafted in this round.

        sampled: the temperature is not 0. blind: what single tokens were drawn may not be looked at.
        """
        shares, reached, places = self.shares, 1.0, []
        average = _sigmoid(confidence.base)
        for held, drafted in enumerate(pending):
            holds, ranked = average, drafted.ranked
            said = None if blind or ranked is None else self._said(ranked, sampled)
            if said is not None:
                holds = _sigmoid(said + confidence.bias)
            if ranked is not None:
                own = shares[: len(ranked.tokens)] if blind else self._shares(ranked, sampled)
                places.append(Place(held, reached * (1 - holds), own, False))
            reached *= holds
        if late:
            places.append(Place(len(pending), reached * (1 - average), shares, True))
        return places

    def observe(self, drafted: Sequence[Drafted], decision: Decision, confidence: Confidence, sampled: bool) -> None:
        """Learn from a verdict about the first of these tokens."""
        accepted = decision.accepted
        for index, token in enumerate(drafted[: min(accepted + 1, len(decision.tested))]):
            said = None if token.ranked is None else self._said(token.ranked, sampled)
            for known, rate in ((confidence, _RATE), (self._all, _RATE_ALL)):
                known.observe(index < accepted, said, rate)
        if decision.rejected and (ranked := drafted[accepted].ranked) is not None:
            self._corrections = _FORGET * self._corrections + 1
            self._ranks = [_FORGET * count for count in self._ranks]
            if decision.next_token in ranked.tokens:
                self._ranks[ranked.tokens.index(decision.next_token)] += 1

    def _said(self, ranked: Ranked, sampled: bool) -> float | None:
        """The log odds that the draft gives its token; None where it gives none."""
        if not ranked.tokens:  # a row with one token only, or one that is no distribution
            return None
        if not sampled:
            return _logit(math.exp(ranked.drawn))
        if self._rule == "coupled":
            others = sum(math.exp(score - ranked.drawn) for score in ranked.scores)
            return _logit(1 / (1 + others))
        return None  # a test asks for p / q, of which q alone says little

    def _shares(self, ranked: Ranked, sampled: bool) -> list[float]:
        weights = [math.exp(score) for score in ranked.scores]
        # Perturbed scores have no common scale: there the alternatives that are known share everything.
        perturbed = sampled and self._rule == "coupled"
        rest = sum(weights) if perturbed else 1 - math.exp(ranked.drawn)
        return [weight / max(rest, _LEAST, weight) for weight in weights]


def choose(places: Sequence[Sequence[Place]], most: int) -> list[Choice]:
    """The ``most`` likeliest verdicts of all requests, best first; of ranks always the better ones, and so
    none beyond ``most``."""
    queue = [
        (-place.chance * place.shares[0], request, index, 0)
        for request, own in enumerate(places)
        for index, place in enumerate(own)
        if place.shares
    ]
    heapq.heapify(queue)
    chosen: list[Choice] = []
    while queue and len(chosen) < most:
        _, request, index, rank = heapq.heappop(queue)
        place = places[request][index]
        chosen.append(Choice(request, place, rank))
        if rank + 1 < len(place.shares):
            heapq.heappush(queue, (-place.chance * place.shares[rank + 1], request, index, rank + 1))
    return chosen


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _logit(p: float) -> float:
    p = min(max(p, _LEAST), _MOST)
    return math.log(p / (1 - p))

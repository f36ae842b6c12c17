"""Prepared windows: which a round drafts, what they hold meanwhile, and which of them came true (docs/algorithm.md).

A branch lives from the plan of a round to its verdict: then its pages are its request's, or free again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pearl.engine.odds import MOST_RANKS, Choice, Odds, Place, choose
from pearl.engine.request import Request
from pearl.kv import KVCacheManager, OutOfPages, PageCopy
from pearl.messages import Branch, Decision, Drafted, DraftPlan, DraftWork, VerifyResult, branch_of
from pearl.pace import Pace
from pearl_kernels import Rule

Chooser = Callable[[Sequence[Sequence[Place]], int], list[Choice]]


class Kind(NamedTuple):
    """What branches are counted by. ``late``: about the first token of the round's own windows."""

    held: int
    late: bool
    rank: int


@dataclass
class BranchCounts:
    """Since the engine was built."""

    tried: Counter[Kind] = field(default_factory=Counter)
    hits: Counter[Kind] = field(default_factory=Counter)
    corrections: Counter[tuple[int, bool]] = field(default_factory=Counter)  # by held and late: what hits are part of


class Drafting(NamedTuple):
    """A request that drafts in the round being planned, and is verified in it."""

    request: Request
    place: int  # of its item in the draft's work
    window: int  # as long as its pace says
    late: bool  # whether the first token of its window is tested


@dataclass
class DraftParts:
    """A draft's plan being made."""

    work: list[DraftWork] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    late_copies: list[PageCopy] = field(default_factory=list)
    alternatives: int = 0

    def freeze(self, alone: bool) -> DraftPlan:
        return DraftPlan(tuple(self.work), tuple(self.copies), tuple(self.late_copies), self.alternatives, alone)


class Branches:
    """Belongs to the scheduler. ``most``: branches of a round, at most; ``kv``: the draft's, if it keeps any.
    ``shift``: by how much that lies behind the text; if it does, all branches begin when the first token of their
    request's window is drawn.

    A branch takes a slot, which a hit keeps until its window is decided: each request has at most one of those.
    """

    def __init__(
        self,
        kv: KVCacheManager | None,
        lanes: int,
        most: int,
        rule: Rule,
        chooser: Chooser = choose,
        shift: int = 0,
    ) -> None:
        self._kv, self._most, self._rule, self._choose, self._shift = kv, most, rule, chooser, shift
        self._free_slots = list(range(most + lanes))[::-1]
        self._odds = Odds(rule)
        self.counts = BranchCounts()

    def plan(self, drafting: Sequence[Drafting], parts: DraftParts, pace: Pace, mode_changes: bool) -> None:
        """Add the likeliest branches, as many as the pace says and pages are left: nobody is preempted for them."""
        most = min(pace.branches, self._most)
        parts.alternatives = min(most, MOST_RANKS)
        if not drafting:
            return
        places = [self._places(own, parts.work[own.place], mode_changes) for own in drafting]
        longest = max(item.num_draft for item in parts.work)
        # Of a page that is itself copied in this round, what it is copied from.
        origin = {copy.destination: copy.source for copy in parts.copies}
        for choice in self._choose(places, most):
            own = drafting[choice.request]
            window = min(pace.branch_window or own.window, longest - self._is_late(choice.place))
            window = min(window, own.request.remaining - choice.place.held - 1)
            if window <= 0:
                continue
            try:
                self._begin(own.request, choice, window, parts, origin)
            except OutOfPages:
                break
        for request, place, *_ in drafting:
            if request.branches:
                parts.work[place] = parts.work[place]._replace(branches=request.branches)

    def _places(self, own: Drafting, item: DraftWork, mode_changes: bool) -> list[Place]:
        request = own.request
        if request.confidence is None:
            request.confidence = self._odds.confidence()
        sampled = request.params.temperature > 0
        # Of an output that is drawn, and may be decided by tests or by the target alone, tests would be chosen by what
        # was drawn. Likewise what q a token is drawn from by a head, which depends on when it is drawn.
        blind = sampled and self._rule != "coupled" and ((mode_changes and not request.pinned) or self._shift > 0)
        places = self._odds.places(request.pending, request.confidence, sampled, blind, own.late)
        # A branch computes one token: what stands before it must have been computed.
        alone = self._kv is not None and not self._shift
        first_new = item.forward.start - request.length if alone else len(request.pending)
        return [place for place in places if place.late or place.held <= first_new]

    def _begin(
        self, request: Request, choice: Choice, window: int, parts: DraftParts, origin: Mapping[int, int]
    ) -> None:
        (held, _, _, late), rank = choice.place, choice.rank
        slot, start = self._free_slots[-1], request.length + held
        table: tuple[int, ...] = ()
        if self._kv is not None:
            branch_id = branch_of(slot)
            begin = start - self._shift
            copy = self._kv.branch(request.id, branch_id, begin, begin + window)
            table = self._kv.branch_table(branch_id)
            if copy is not None and self._is_late(choice.place):
                parts.late_copies.append(copy)
            elif copy is not None:
                parts.copies.append(PageCopy(origin.get(copy.source, copy.source), copy.destination))
        self._free_slots.pop()
        token = None if late else _alternative(request.pending[held], rank)
        request.branches += (Branch(slot, held, rank, token, start, window, table, request.seed_after(held)),)
        request.metrics.prepared += 1
        self.counts.tried[Kind(held, late, rank)] += 1

    def _is_late(self, place: Place) -> bool:
        """Whether it begins a step after the window."""
        return place.late or self._shift > 0

    def settle(self, request: Request, result: VerifyResult) -> tuple[Drafted, ...]:
        """End a request's branches, before the verdict is applied. Returns what was drafted behind the correction, if
        one of them was the verdict: the request goes on with its pages.
        """
        decision = result.decisions.get(request.id)
        if decision is not None:
            self._learn(request, decision, result.windows.get(request.id, ()))
            self._free_slot(request)  # of pending tokens, which are decided now
        ahead: tuple[Drafted, ...] = ()
        branches, request.branches = request.branches, ()
        for branch in branches:
            window = result.prepared.get(branch.id, ())
            if decision is not None and not ahead and is_hit(branch, window, decision):
                ahead, request.slot = window[1:], branch.slot
                if self._kv is not None:
                    self._kv.adopt(branch.id)
                request.metrics.prepared_hits += 1
                self.counts.hits[Kind(branch.held, branch.token is None, branch.rank)] += 1
            else:
                request.metrics.prepared_in_vain += max(0, len(window) - 1)
                self._drop(branch)
        return ahead

    def _learn(self, request: Request, decision: Decision, window: Sequence[Drafted]) -> None:
        if request.confidence is None:  # none was ever prepared
            return
        drafted = (*request.pending, *window[:1])
        self._odds.observe(drafted, decision, request.confidence, request.params.temperature > 0)
        if decision.rejected:
            self.counts.corrections[decision.accepted, decision.accepted == len(request.pending)] += 1

    def release(self, request: Request) -> None:
        """Give up everything of a request that no longer runs."""
        self._free_slot(request)
        branches, request.branches = request.branches, ()
        for branch in branches:
            self._drop(branch)

    def _drop(self, branch: Branch) -> None:
        if self._kv is not None:
            self._kv.drop(branch.id)
        self._free_slots.append(branch.slot)

    def _free_slot(self, request: Request) -> None:
        if request.slot is not None:
            self._free_slots.append(request.slot)
            request.slot = None


def _alternative(drafted: Drafted, rank: int) -> int:
    assert drafted.ranked is not None
    return drafted.ranked.tokens[rank]


def is_hit(branch: Branch, window: Sequence[Drafted], decision: Decision) -> bool:
    """Whether the verdict is what the branch was prepared for, with something behind it."""
    return (
        decision.rejected
        and decision.error is None
        and branch.held == decision.accepted
        and len(window) > 1
        and window[0].token == decision.next_token
    )

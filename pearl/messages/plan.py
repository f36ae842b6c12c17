"""What the scheduler asks of both models and of the verifier in a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.grammars import Grammar
from pearl.host_tensors import from_numbers
from pearl.kv import PageCopy
from pearl.messages.drafted import Drafted
from pearl.pace import Load, Pace
from pearl.sampling_params import SamplingParams


@dataclass(frozen=True)
class SequenceState:
    """The part of a request that samplers and logits processors need."""

    request_id: int
    lane: int  # index of the running request in [0, max_num_seqs): owns one region of every per-request buffer
    params: SamplingParams
    seed: int
    prompt_length: int
    history: tuple[int, ...] | None  # committed + pending tokens; None where nothing reads them
    grammar: Grammar | None = None


class ForwardWork(NamedTuple):
    """One sequence's share of a forward: compute ``tokens`` at positions [start, start + len(tokens))."""

    state: SequenceState
    tokens: tuple[int, ...]
    start: int
    num_logits: int  # logits of the last num_logits tokens are wanted; 0 for most prefill chunks
    block_table: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


def branch_of(slot: int) -> int:
    """The id of the branch that has this slot: no request's."""
    return -1 - slot


class Branch(NamedTuple):
    """A window that is prepared for one verdict: ``held`` of the tokens that are tested hold, and ``token`` follows.

    It begins with that token, at position ``start``; after it at most ``num_draft`` are drafted. Token None: of the
    first token drafted in this round, the alternative of ``rank``, as soon as that is known (a *late* branch).
    """

    slot: int  # its region of the logits ring
    held: int
    rank: int  # of the token among the alternatives to the drafted one
    token: int | None
    start: int
    num_draft: int
    block_table: tuple[int, ...]
    seed: int | None = None  # of what is drawn behind the token, where a rejection changes keys; None: the request's

    @property
    def id(self) -> int:
        """Of its KV and of its window."""
        return branch_of(self.slot)


class DraftWork(NamedTuple):
    """Catch up on ``forward``, then draft ``num_draft`` tokens after it (0: only catch up), and what branches off.

    A drafter that reads the target's hidden states lags one position behind the text: what it computes at position p
    is of the state at p and the token at p + 1, which ``forward.tokens`` has for each p in [start, end). Its
    ``forward`` ends where the target's states do, before ``pending``; the window comes after these. Its branches begin
    when the first token of the window is drawn, also those whose token is known.
    """

    forward: ForwardWork
    num_draft: int
    branches: tuple[Branch, ...] = ()
    pending: tuple[int, ...] | None = None  # None: of another drafter, whose ``forward`` has them
    slot: int | None = None  # of the branch that the first pending tokens were drafted in; None: in no branch

    def state_of(self, branch: Branch) -> SequenceState:
        """With the keys that draws have behind a branch's token, should the branch be the verdict."""
        state = self.forward.state
        return state if branch.seed is None else replace(state, seed=branch.seed)

    @property
    def position(self) -> int:
        """Of the first token of the window, in the text."""
        return self.forward.end if self.pending is None else self.forward.end + 1 + len(self.pending)


class PromptRows(NamedTuple):
    """Prompt tokens whose log-probabilities are wanted, with the ``most`` likely tokens in the place of each.

    The first rows of the request's logits tell them, before those of its verdict.
    """

    request_id: int
    tokens: tuple[int, ...]
    most: int


@dataclass(frozen=True)
class TargetPlan:
    work: tuple[ForwardWork, ...]
    copies: tuple[PageCopy, ...] = ()  # performed before the forward (copy-on-write)
    prompts: tuple[PromptRows, ...] = ()  # in the order of ``work``


class TargetStates(NamedTuple):
    """The target's hidden states of the tokens that its latest forward computed, for a drafter that reads them.

    rows: ``[N, layers, D]`` where the target is. spans: by request id, the row of its first token, and the positions
    [start, end) that it and those after it have.
    """

    rows: Tensor
    spans: dict[int, tuple[int, int, int]]

    @classmethod
    def of(cls, plan: TargetPlan, hidden: Tensor | None) -> TargetStates | None:
        """``hidden``: as the ``TargetOutput`` of this plan has them; None where it has none."""
        if hidden is None:
            return None
        spans, begin = {}, 0
        for work in plan.work:
            spans[work.state.request_id] = begin, work.start, work.end
            begin += len(work.tokens)
        return cls(hidden, spans)

    def of_work(self, work: Sequence[ForwardWork]) -> Tensor:
        """``[N, layers, D]``, of all positions of these items. LookupError if one is not of that forward."""
        return self._take([row for item in work for row in self._rows(item.state.request_id, item.start, item.end)])

    def of_ends(self, work: Sequence[ForwardWork]) -> Tensor:
        """``[R, layers, D]``, of the last position of each. LookupError likewise."""
        return self._take([row for item in work for row in self._rows(item.state.request_id, item.end - 1, item.end)])

    def _rows(self, request_id: int, begin: int, end: int) -> range:
        row, first, last = self.spans.get(request_id, (0, 0, 0))
        if not first <= begin <= end <= last:
            raise LookupError(f"the target's hidden states at [{begin}, {end}) are not at hand, only [{first}, {last})")
        return range(row + begin - first, row + end - first)

    def _take(self, rows: list[int]) -> Tensor:
        begin, end = (rows[0], rows[0] + len(rows)) if rows else (0, 0)
        if rows == list(range(begin, end)):
            return self.rows[begin:end]
        return self.rows[from_numbers(rows, torch.int64, self.rows.device)]


@dataclass(frozen=True)
class DraftPlan:
    """``alternatives``: how many are to be ranked for each drafted token of the main windows. ``alone``: the target
    rests meanwhile.
    """

    work: tuple[DraftWork, ...]
    copies: tuple[PageCopy, ...] = ()
    late_copies: tuple[PageCopy, ...] = ()  # performed when every item has caught up, before late branches begin
    alternatives: int = 0
    alone: bool = False
    states: TargetStates | None = None  # of the round before, for a drafter that reads them


class VerifyWork(NamedTuple):
    """Tokens to test for one request, aligned with the logits rows of its ForwardWork.

    ``pending`` are tested on rows [0, k). If the forward yields one row more, the first token drafted this round
    is tested there; where the drafter gave none, that row is a bonus row.
    """

    request_id: int
    pending: tuple[Drafted, ...]
    position: int  # of the first row's token: L
    pinned: bool = False  # each token is tested by itself, whatever the rule: in what blocks it comes is chance


@dataclass(frozen=True)
class SchedulerOutput:
    """A round: host only, immutable, pages already reserved. ``verify`` runs parallel to ``target.work``."""

    target: TargetPlan
    draft: DraftPlan
    verify: tuple[VerifyWork, ...] = ()
    preempted: tuple[int, ...] = ()
    pace: Pace | None = None
    load: Load | None = None  # of the requests that the pace was chosen for; None where none is drafted for

    @property
    def is_empty(self) -> bool:
        return not self.target.work and not self.draft.work

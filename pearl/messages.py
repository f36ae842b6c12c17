"""What crosses between the stages of a round. Every message is frozen; token ids are Python ints. Those of which each
request has one in every round are tuples, which are made three times as fast as frozen dataclasses.

Notation: a request has L committed tokens and k pending ones (drafted, not yet verified), at positions
[0, L) and [L, L + k). ``start`` is the position of a work item's first token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pearl.grammars import Grammar
from pearl.kv import PageCopy
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

    @property
    def id(self) -> int:
        """Of its KV and of its window."""
        return branch_of(self.slot)


class DraftWork(NamedTuple):
    """Catch up on ``forward``, then draft ``num_draft`` tokens after it (0: only catch up), and what branches off.

    A drafter that reads the target's hidden states lags one position behind the text: what it computes at position p
    is of the state at p and the token at p + 1, which ``forward.tokens`` has for each p in [start, end). Its
    ``forward`` ends where the target's states do, before ``pending``; the window comes after these.
    """

    forward: ForwardWork
    num_draft: int
    branches: tuple[Branch, ...] = ()
    pending: tuple[int, ...] | None = None  # None: of another drafter, whose ``forward`` has them

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
    def of(cls, plan: TargetPlan, output: TargetOutput) -> TargetStates | None:
        """None where there are none."""
        if output.hidden is None:
            return None
        spans, begin = {}, 0
        for work in plan.work:
            spans[work.state.request_id] = begin, work.start, work.end
            begin += len(work.tokens)
        return cls(output.hidden, spans)

    def at(self, request_id: int, begin: int, end: int) -> Tensor:
        """``[end - begin, layers, D]``, of positions [begin, end). LookupError if one is not of that forward."""
        row, first, last = self.spans.get(request_id, (0, 0, 0))
        if not first <= begin <= end <= last:
            raise LookupError(f"the target's hidden states at [{begin}, {end}) are not at hand, only [{first}, {last})")
        return self.rows[row + begin - first : row + end - first]


@dataclass(frozen=True)
class DraftPlan:
    """``alternatives``: how many are to be ranked for each drafted token of the main windows."""

    work: tuple[DraftWork, ...]
    copies: tuple[PageCopy, ...] = ()
    late_copies: tuple[PageCopy, ...] = ()  # performed when every item has caught up, before late branches begin
    alternatives: int = 0
    states: TargetStates | None = None  # of the round before, for a drafter that reads them


class Mark(Protocol):
    """A point in the work of a device."""

    def wait(self) -> None:
        """Until the device has come this far."""
        ...


class Interval(Protocol):
    """When a model worked. Of work on a GPU it is known, and waited for, when it is read."""

    @property
    def begin(self) -> float:
        """In time.perf_counter() seconds."""
        ...

    @property
    def seconds(self) -> float: ...


class Busy(NamedTuple):
    """An ``Interval`` that has passed."""

    begin: float
    seconds: float

    @classmethod
    def since(cls, begin: float) -> Busy:
        return cls(begin, time.perf_counter() - begin)


NOT_BUSY = Busy(0.0, 0.0)


class Ranked(NamedTuple):
    """What might stand in a drafted token's place, best first, with the scores that ``sample`` gives them."""

    drawn: float  # the drafted token's own score
    tokens: tuple[int, ...]
    scores: tuple[float, ...]


class Drafted(NamedTuple):
    """A drafted token. ``logprob`` is log q(token); ``row`` is its row of the drafter's logits, -1: point mass."""

    token: int
    logprob: float
    row: int
    ranked: Ranked | None = None  # where alternatives were asked for


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


Windows = dict[int, tuple[Drafted, ...]]  # by request id, or by branch id: then the first token is the branch's own


@dataclass(frozen=True)
class DrawnTokens:
    """Tokens of R requests and their log q in one tensor, so that one transfer takes both: int64 ``[..., 2, R]``."""

    packed: Tensor

    @property
    def tokens(self) -> Tensor:
        """int64 ``[..., R]``"""
        return self.packed[..., 0, :]

    @property
    def logprobs(self) -> Tensor:
        """fp32 ``[..., R]``: the first half of its row."""
        return self.packed[..., 1, :].view(torch.float32)[..., : self.packed.shape[-1]]


@dataclass(frozen=True)
class DeviceWindows:
    """Windows that a device is still drafting, g tokens for each of R requests, with a copy under way to the host.

    drawn: ``[g, 2, R]`` on the drafter's device: its first tokens, and their rows of the drafter's logits, after
    ``first_ready``, all after ``ready``; on the host after ``ready``.
    """

    rows: dict[int, tuple[int, ...]]  # by request id, in the order of the columns: ``Drafted.row`` of its tokens
    drawn: DrawnTokens
    on_host: DrawnTokens
    first_ready: Mark
    ready: Mark

    @property
    def steps(self) -> int:
        return self.drawn.packed.shape[0]

    @property
    def first(self) -> DrawnTokens:
        return DrawnTokens(self.drawn.packed[0])

    def read(self) -> Windows:
        """Waits for them."""
        self.ready.wait()
        tokens, logprobs = self.on_host.tokens.T.tolist(), self.on_host.logprobs.T.tolist()
        return {
            request_id: tuple(map(Drafted, tokens[column], logprobs[column], rows))
            for column, (request_id, rows) in enumerate(self.rows.items())
        }

    def outlines(self) -> Windows:
        """As ``read``, without waiting, and so without tokens and probabilities."""
        return {request_id: tuple(Drafted(0, 0.0, row) for row in rows) for request_id, rows in self.rows.items()}


@dataclass(frozen=True)
class DraftProposal:
    windows: Windows = field(default_factory=dict)
    logits: Tensor | None = None  # [Q, Vq] raw draft logits that ``Drafted.row`` points into
    steps: int = 0  # forwards of the draft model
    busy: Interval = NOT_BUSY
    on_device: DeviceWindows | None = None  # beside ``windows``
    stored: Mark | None = None  # after it ``logits`` has the rows of ``windows``, of this round and of those before
    prepared: Windows = field(default_factory=dict)  # of branches; of a late one that had no token, an empty one


@dataclass(frozen=True)
class TargetOutput:
    logits: Tensor | None  # [sum of num_logits, V], in the order of the plan's work
    busy: Interval = NOT_BUSY
    hidden: Tensor | None = None  # [N, layers, D] of all tokens, in the same order; where a drafter reads them


class TokenLogprobs(NamedTuple):
    """Log-softmax of the target's raw logits: of the token itself, and of the most likely alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...]


# Of each prompt token; of the first one nothing can be told.
PromptLogprobs = tuple[TokenLogprobs | None, ...]


class FoundPrompt(NamedTuple):
    """Log-probabilities of ``size`` prompt tokens, made by a call."""

    size: int
    entries: Callable[[], tuple[TokenLogprobs, ...]]


class Decision(NamedTuple):
    """The verdict for one request: what was tested, how much of it holds, what follows."""

    tested: tuple[int, ...]
    accepted: int
    next_token: int | None  # correction or bonus token
    logprobs: Callable[[], tuple[TokenLogprobs, ...]] | None  # of each committed token, where asked for: made by a call
    error: str | None = None  # why the request cannot go on: nothing of the verdict is an output

    @property
    def committed(self) -> tuple[int, ...]:
        held = self.tested[: self.accepted]
        return held if self.next_token is None else (*held, self.next_token)

    @property
    def rejected(self) -> bool:
        return self.accepted < len(self.tested)


@dataclass(frozen=True)
class VerifyResult:
    decisions: dict[int, Decision] = field(default_factory=dict)  # by request id
    windows: Windows = field(default_factory=dict)  # what was drafted in this round
    prepared: Windows = field(default_factory=dict)
    prompts: dict[int, FoundPrompt] = field(default_factory=dict)  # by request id

"""What crosses between the stages of a round. Every message is frozen; token ids are Python ints.

Notation: a request has L committed tokens and k pending ones (drafted, not yet verified), at positions
[0, L) and [L, L + k). ``start`` is the position of a work item's first token.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from pearl.kv import PageCopy
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


@dataclass(frozen=True)
class ForwardWork:
    """One sequence's share of a forward: compute ``tokens`` at positions [start, start + len(tokens))."""

    state: SequenceState
    tokens: tuple[int, ...]
    start: int
    num_logits: int  # logits of the last num_logits tokens are wanted; 0 for a prefill chunk
    block_table: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True)
class DraftWork:
    """Catch up on ``forward``, then draft ``num_draft`` tokens after it (0: only catch up)."""

    forward: ForwardWork
    num_draft: int


@dataclass(frozen=True)
class TargetPlan:
    work: tuple[ForwardWork, ...]
    copies: tuple[PageCopy, ...] = ()  # performed before the forward (copy-on-write)


@dataclass(frozen=True)
class DraftPlan:
    work: tuple[DraftWork, ...]
    copies: tuple[PageCopy, ...] = ()


class Busy(NamedTuple):
    """When a model worked: begin in time.perf_counter() seconds, and for how long."""

    begin: float
    seconds: float

    @classmethod
    def since(cls, begin: float) -> Busy:
        return cls(begin, time.perf_counter() - begin)


NOT_BUSY = Busy(0.0, 0.0)


class Drafted(NamedTuple):
    """A drafted token. ``logprob`` is log q(token); ``row`` is its row of the drafter's logits, -1: point mass."""

    token: int
    logprob: float
    row: int


@dataclass(frozen=True)
class VerifyWork:
    """Tokens to test for one request, aligned with the logits rows of its ForwardWork.

    ``pending`` are tested on rows [0, k). If the forward yields one row more, the first token drafted this round
    is tested there; where the drafter gave none, that row is a bonus row.
    """

    request_id: int
    pending: tuple[Drafted, ...]
    position: int  # of the first row's token: L


@dataclass(frozen=True)
class SchedulerOutput:
    """A round: host only, immutable, pages already reserved. ``verify`` runs parallel to ``target.work``."""

    target: TargetPlan
    draft: DraftPlan
    verify: tuple[VerifyWork, ...] = ()
    preempted: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.target.work and not self.draft.work


@dataclass(frozen=True)
class DraftProposal:
    windows: dict[int, tuple[Drafted, ...]] = field(default_factory=dict)  # by request id
    logits: Tensor | None = None  # [Q, Vq] raw draft logits that ``Drafted.row`` points into
    steps: int = 0  # forwards of the draft model
    busy: Busy = NOT_BUSY


@dataclass(frozen=True)
class TargetOutput:
    logits: Tensor | None  # [sum of num_logits, V], in the order of the plan's work
    busy: Busy = NOT_BUSY


class TokenLogprobs(NamedTuple):
    """Log-softmax of the target's raw logits: of the token itself, and of the most likely alternatives."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Decision:
    """The verdict for one request: what was tested, how much of it holds, what follows."""

    tested: tuple[int, ...]
    accepted: int
    next_token: int | None  # correction or bonus token
    logprobs: tuple[TokenLogprobs, ...] | None  # of each committed token, where asked for

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

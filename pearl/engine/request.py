"""A request's state. The engine thread owns it; workers only ever see frozen messages made from it."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from pearl.engine.odds import Confidence
from pearl.engine.output_processor import OutputProcessor
from pearl.engine.prompt_logprobs import PromptProgress
from pearl.grammars import Grammar
from pearl.messages import Branch, Decision, Drafted, DraftWork, ForwardWork, SequenceState
from pearl.outputs import RequestMetrics, TokenSource
from pearl.sampling_params import SamplingParams


class Status(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass
class Request:
    """One sequence: committed tokens, then pending ones.

    Invariants between rounds, with L = len(tokens) and k = len(pending):
    * target KV is valid for positions [0, target_computed), target_computed < L: the target computes a drafted token
      only to judge it, so at least the last committed token is always still to be computed;
    * draft KV is valid for positions [0, draft_computed), draft_computed < L + k. Of a drafter that reads the target's
      hidden states only what it computed of these counts, draft_computed <= target_computed: never a drafted token.
    """

    id: int
    params: SamplingParams
    seed: int
    tokens: list[int]
    prompt_length: int
    max_tokens: int  # params.max_tokens, cut to what the context still holds
    output: OutputProcessor
    metrics: RequestMetrics
    pinned: bool = False  # reproducible although draws depend on the draft: every token must be drafted and tested
    rekeys: bool = False  # draws after a rejection have new keys: its verdict saw the noise of positions to come
    grammar: Grammar | None = None  # that the output must be of
    prompt_logprobs: PromptProgress | None = None  # where they are wanted
    status: Status = Status.WAITING
    lane: int = -1  # while running
    pending: tuple[Drafted, ...] = ()
    target_computed: int = 0
    draft_computed: int = 0
    draft_is_dry: bool = False
    run_length: int = field(default=0, repr=False)  # accepted tokens of the run in progress
    branches: tuple[Branch, ...] = ()  # of the round in progress
    slot: int | None = None  # of a branch whose window is pending
    confidence: Confidence | None = None  # since branches were first thought of
    pending_ahead: bool = False  # whether pending tokens are such a window
    judged_ahead: int = field(default=0, repr=False)  # tokens of the latest verdict that a branch had drafted,
    judged_pending: int = field(default=0, repr=False)  # and that were pending
    _noise_seed: int | None = field(default=None, repr=False)  # of draws now; None: ``seed``
    _state: SequenceState | None = field(default=None, repr=False)  # without a history, of the lane that it has

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def remaining(self) -> int:
        return self.max_tokens + self.prompt_length - len(self.tokens)

    @property
    def target_lags(self) -> bool:
        """Whether the target still computes the prompt (or, after a preemption, the text)."""
        return len(self.tokens) - self.target_computed > 1

    @property
    def draft_lags(self) -> bool:
        """Likewise the draft, which after a bonus token is two tokens behind."""
        return len(self.tokens) + len(self.pending) - self.draft_computed > 2

    @property
    def reusable(self) -> Sequence[int]:
        """Tokens, of which all but the last may be found in the target's prefix cache: a row of logits that is wanted
        must be computed.
        """
        progress = self.prompt_logprobs
        return self.tokens if progress is None or not progress.missing else self.tokens[: progress.first_row + 1]

    def start_running(self, lane: int, target_cached: int, draft_cached: int) -> None:
        self.status, self.lane = Status.RUNNING, lane
        self.target_computed, self.draft_computed = target_cached, draft_cached
        if self.metrics.rounds == 0:
            self.metrics.cached_tokens = target_cached

    def find(self, target_cached: int, draft_cached: int) -> None:
        """So many more tokens are computed already: others with the same prompt have come there first."""
        self.target_computed += target_cached
        self.draft_computed += draft_cached
        if not self.metrics.preemptions:
            self.metrics.cached_tokens += target_cached

    def preempt(self) -> None:
        """Give up all KV; committed tokens are computed again later, pending ones are forgotten."""
        self.status, self.lane, self.pending, self.pending_ahead = Status.WAITING, -1, (), False
        self.target_computed = self.draft_computed = 0
        self.metrics.preemptions += 1

    def state(self, with_history: bool) -> SequenceState:
        if with_history:
            return self._make_state(self.token_range(0, len(self.tokens) + len(self.pending)))
        if self._state is None or self._state.lane != self.lane:
            self._state = self._make_state(None)
        return self._state

    def _make_state(self, history: tuple[int, ...] | None) -> SequenceState:
        seed = self.seed if self._noise_seed is None else self._noise_seed
        return SequenceState(self.id, self.lane, self.params, seed, self.prompt_length, history, self.grammar)

    def seed_after(self, held: int) -> int | None:
        """Of draws behind a correction, if ``held`` of the tokens that are tested hold; None: the same as now."""
        return _rekeyed(self.seed, len(self.tokens) + held + 1) if self.rekeys else None

    def token_range(self, start: int, end: int) -> tuple[int, ...]:
        """Tokens at positions [start, end) of the committed and then the pending tokens."""
        length = len(self.tokens)
        if end <= length:
            return tuple(self.tokens[start:end])
        tail = [drafted.token for drafted in self.pending[max(0, start - length) : end - length]]
        return (*self.tokens[start:length], *tail)

    def apply(
        self,
        target: ForwardWork | None,
        draft: DraftWork | None,
        window: tuple[Drafted, ...],
        decision: Decision | None,
        ahead: tuple[Drafted, ...] = (),
    ) -> tuple[int, ...]:
        """Apply one round: what was computed, the window drafted in it, and the verdict, if there was one.

        ahead: what is drafted behind the correction already; the draft's KV is that of the branch.

        Returns the newly committed tokens. Rollback happens here and is only this: ``*_computed`` never covers a
        token that was rejected.
        """
        length, pending = len(self.tokens), self.pending
        self._compute(target, draft, window)
        self.judged_ahead = 0
        if decision is None:
            if draft is not None and draft.num_draft:
                self.pending, self.draft_is_dry = (*pending, *window), not window
            return ()
        committed, rejected = decision.committed, decision.rejected
        self.draft_is_dry = False
        self.target_computed = min(self.target_computed, length + decision.accepted, length + len(pending))
        if rejected:
            self.draft_computed = min(self.draft_computed, length + decision.accepted)
        # Where the first drafted token was tested and held, the rest of its window is pending now.
        continues = not rejected and decision.next_token is None
        self.judged_pending = len(pending)
        self.judged_ahead = len(pending) if self.pending_ahead else 0
        self.pending, self.pending_ahead = (window[1:] if continues else ()), False
        self.tokens.extend(committed)
        if rejected and self.rekeys:
            self._noise_seed, self._state = _rekeyed(self.seed, len(self.tokens)), None
        if ahead:
            self.pending, self.pending_ahead = ahead, True
            self.metrics.drafted += len(ahead)
            own_tokens = draft is not None and draft.pending is None
            if self.draft_computed and own_tokens:  # of a drafter that keeps KV
                self.draft_computed = len(self.tokens) + len(ahead) - 1
        return committed

    def _compute(self, target: ForwardWork | None, draft: DraftWork | None, window: tuple[Drafted, ...]) -> None:
        """What both models have computed, as if all of it held."""
        metrics = self.metrics
        metrics.rounds += 1
        if target is not None:
            self.target_computed = target.end
            metrics.target_forwards += 1
        if draft is None:
            return
        metrics.drafted += len(window)
        if draft.forward.tokens:  # a drafter without KV computes nothing
            # The window's last token is not computed; after an empty window neither is the token before it, so that
            # the next draft has something to start from.
            drafts = draft.num_draft and draft.pending is None
            self.draft_computed = draft.forward.end + (len(window) - 1 if drafts else 0)
            metrics.draft_forwards += len(window) or 1

    def count(self, decision: Decision, kept: int) -> None:
        """Add to the metrics what of a verdict is returned: its first ``kept`` committed tokens."""
        metrics = self.metrics
        accepted, tested = min(decision.accepted, kept), len(decision.tested)
        metrics.output_tokens += kept
        metrics.tested += min(kept, tested)
        metrics.accepted += accepted
        metrics.prepared_accepted += min(accepted, self.judged_ahead)
        self.run_length += accepted
        if tested:
            histogram = metrics.acceptance_histogram
            histogram.extend([0] * (accepted + 1 - len(histogram)))
            histogram[accepted] += 1
        if kept > accepted and tested:  # a correction or a bonus token
            metrics.runs += 1
            self.run_length = 0

    def sources(self, decision: Decision, kept: int) -> tuple[TokenSource, ...]:
        """How the first ``kept`` committed tokens of the latest verdict came."""
        ahead = min(self.judged_ahead, decision.accepted)
        tested: TokenSource = "post-verify" if self.judged_pending else "pre-verify"
        own: TokenSource = "corrected" if decision.rejected else "plain"
        prepared: TokenSource = "prepared"
        return ((prepared,) * ahead + (tested,) * (decision.accepted - ahead) + (own,))[:kept]

    def end_run(self) -> None:
        """The run in progress ends with a preemption, or with the output: when all before it is counted."""
        if self.run_length:
            self.metrics.runs += 1
            self.run_length = 0

    def finish(self) -> None:
        self.status, self.pending, self.lane = Status.FINISHED, (), -1


def _rekeyed(seed: int, length: int) -> int:
    """A 64-bit seed for what is drawn after a rejection that left so many tokens: no two of a request's are alike."""
    words = (seed % 2**64).to_bytes(8, "little") + length.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")

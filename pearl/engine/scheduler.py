"""Decides who computes what in a round. Everything is one rule: each model catches up with its tokens.

There are no prefill and decode phases. A request whose model lags by more than the token budget gets a chunk; one
that has caught up takes part in the round as its decoding method wants. Rejection is ``truncate``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from pearl.engine.branches import Branches, Drafting
from pearl.engine.draft_sides import DraftSide, OwnTokens, TargetStates
from pearl.engine.prompt_budget import share
from pearl.engine.request import Request, Status
from pearl.engine.round_plan import RoundPlan
from pearl.engine.shared_prompts import Behind, find_waiting
from pearl.errors import InvalidRequestError, QueueFullError
from pearl.kv import KVCacheManager, OutOfPages, PageCopy
from pearl.messages import DraftWork, ForwardWork, SchedulerOutput, VerifyResult, VerifyWork
from pearl.methods import METHODS, Intent, Progress, plain_intent
from pearl.pace import Load, Pace, PacePolicy


class Scheduler:
    """Owns the requests and both KV managers. First come, first served; the latest arrival is preempted first.

    draft_kv is None where the drafter keeps no KV. branches: None where it prepares no windows. max_logit_rows: of a
    forward of the target, verdicts' and prompts' together; but verdicts are never held back by it.
    drafter_reads_states: it computes from the target's hidden states (``TargetStates``).
    """

    def __init__(
        self,
        pace: PacePolicy,
        target_kv: KVCacheManager,
        draft_kv: KVCacheManager | None,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting: int,
        max_logit_rows: int = 64,
        prefill_chunk: int | None = None,
        drafter_reads_history: bool = False,
        drafter_reads_states: bool = False,
        branches: Branches | None = None,
    ) -> None:
        self._pace = pace
        self.target_kv, self.draft_kv = target_kv, draft_kv
        self._max_num_batched_tokens, self._max_waiting = max_num_batched_tokens, max_waiting
        self._max_logit_rows, self._prefill_chunk = max_logit_rows, prefill_chunk or max_num_batched_tokens
        self._drafter_reads_history, self.branches = drafter_reads_history, branches
        self._draft: DraftSide = TargetStates(draft_kv) if drafter_reads_states else OwnTokens(draft_kv)
        self._free_lanes = list(range(max_num_seqs))[::-1]
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.requests: dict[int, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def require_room(self, count: int) -> None:
        """QueueFullError unless ``count`` more requests may be added: on free lanes they do not wait."""
        require_room(count, len(self._free_lanes), len(self.waiting), self._max_waiting)

    def add(self, request: Request) -> None:
        """Queue a request. Raises QueueFullError, or InvalidRequestError if it could never fit in the KV cache."""
        self.require_room(1)
        self.require_fits(request)
        self.requests[request.id] = request
        self.waiting.append(request)

    def require_fits(self, request: Request) -> None:
        """InvalidRequestError if it could never fit in the KV cache. May be called by any thread at any time."""
        needed = request.prompt_length + request.max_tokens
        for kv in filter(None, (self.target_kv, self.draft_kv if request.params.draft else None)):
            if needed > kv.num_pages * kv.page_size:
                raise InvalidRequestError(
                    f"the request needs KV for {needed} tokens, the cache holds {kv.num_pages * kv.page_size}; "
                    "lower max_tokens or raise kv_cache_memory"
                )

    def schedule(self) -> SchedulerOutput:
        self._admit()
        preempted: list[int] = []
        while True:
            plan = self._plan_batch()
            preempted.extend(plan.preempted)
            # Where a method lets some wait for others, and these all had to go, it is the turn of those that waited:
            # otherwise the same requests would be admitted and preempted for ever.
            if plan.target or plan.draft.work or not (plan.preempted and self.running):
                plan.preempted = preempted
                return plan.freeze()

    def _plan_batch(self) -> RoundPlan:
        batch = list(self.running)
        drafted = [r for r in batch if r.params.draft]
        pace, load, intents = self._decide(drafted)
        plan, windows = RoundPlan(pace, load), list(pace.windows)
        if len(drafted) < len(batch):
            intents, windows = _beside_plain(batch, pace, intents)
        intents = self._draft.intents(batch, intents)
        lag = [self._lags(request, intent) for request, intent in zip(batch, intents, strict=True)]
        if any(lag):
            self._share_budget(plan, batch, intents)
        for request, intent, window, lags in zip(batch, intents, windows, lag, strict=True):
            if request.lane >= 0:  # it may have been preempted for an earlier one
                self._plan_request(plan, request, intent, window, lags)
        if self.branches is not None and pace.branches:
            self.branches.plan(plan.drafting, plan.draft, pace, self._pace.changes)
        return plan

    def _decide(self, drafted: Sequence[Request]) -> tuple[Pace, Load | None, Sequence[Intent]]:
        """For the requests that are drafted for. Where all others are plain, there is nothing to choose."""
        if self.running and not drafted:
            return Pace("autoregressive", ()), None, ()
        load = Load(len(drafted), sum([len(r.tokens) for r in drafted]))
        pinned = self._pace.changes and any(r.pinned for r in drafted)
        pace = self._pace.decide([r.id for r in drafted], load, pinned)
        progress = [Progress(len(r.pending), r.draft_is_dry) for r in drafted]
        intents = METHODS[pace.mode].intents(progress)
        if pinned:
            intents = [i.pinned(p) if r.pinned else i for r, i, p in zip(drafted, intents, progress, strict=True)]
        return pace, load, intents

    def _share_budget(self, plan: RoundPlan, batch: Sequence[Request], intents: Sequence[Intent]) -> None:
        """Decoding rows are never held back by prompts; prompts share what is left of the budget, beside requests that
        decode a chunk at most, and at least a page.
        """
        self._extend(batch, intents)
        on_target = [r for r in batch if r.target_lags]
        on_draft = [r for r, intent in zip(batch, intents, strict=True) if self._draft.is_behind(r, intent)]
        decodes = len({r.id for r in (*on_target, *on_draft)}) < len(batch)
        target_rows = sum(len(r.pending) + 1 for r in batch if not r.target_lags)
        draft_rows = sum(not r.draft_lags for r in batch)
        sharing = [Behind(r.id, r.tokens, r.reusable) for r in on_target if self._draft.leaves_pages(r)]
        waiting = find_waiting(self.target_kv, sharing)
        target = {r.id: r.length + len(r.pending) - r.target_computed for r in on_target if r.id not in waiting}
        self._cut_to_rows(target, batch)
        plan.target_shares = share(self._left_beside(target_rows, decodes), target)
        if self.draft_kv is not None:
            waiting = find_waiting(self.draft_kv, [Behind(r.id, r.tokens, r.tokens) for r in on_draft])
            draft = {r.id: r.length + len(r.pending) - r.draft_computed for r in on_draft if r.id not in waiting}
            plan.draft_shares = share(self._left_beside(draft_rows, decodes), draft)

    def _extend(self, batch: Sequence[Request], intents: Sequence[Intent]) -> None:
        """What has been computed for others since a request began need not be computed again."""
        for request, intent in zip(batch, intents, strict=True):
            target = draft = 0
            if request.target_lags and self._draft.leaves_pages(request):
                target = self.target_kv.extend(request.id, request.reusable)
            if self.draft_kv is not None and self._draft.is_behind(request, intent):
                draft = self.draft_kv.extend(request.id, request.tokens)
            if target or draft:
                request.find(target, draft)

    def _cut_to_rows(self, needs: dict[int, int], batch: Sequence[Request]) -> None:
        """Of prompts whose log-probabilities are wanted a forward computes no more than it may have rows of logits:
        what verdicts leave of them, and at least a page.
        """
        prompts = {r.id: r.prompt_logprobs for r in batch if r.id in needs and r.prompt_logprobs is not None}
        wanted = {request_id: progress.missing for request_id, progress in prompts.items() if progress.missing}
        if not wanted:
            return
        judged = sum(len(r.pending) + 1 for r in batch)
        rows = share(max(self._max_logit_rows - judged, self.target_kv.page_size), wanted)
        for request_id, count in wanted.items():
            if rows[request_id] < count:
                before = prompts[request_id].first_row - self.requests[request_id].target_computed
                needs[request_id] = before + rows[request_id]

    def _left_beside(self, rows: int, decodes: bool) -> int:
        left = self._max_num_batched_tokens - rows
        return max(min(left, self._prefill_chunk) if decodes else left, self.target_kv.page_size)

    def _lags(self, request: Request, intent: Intent) -> bool:
        """Whether a model still computes the prompt, or, a draft that rested, the text; otherwise both are ready."""
        return request.target_lags or self._draft.is_behind(request, intent)

    def _plan_request(self, plan: RoundPlan, request: Request, intent: Intent, window: int, lags: bool) -> None:
        length, k, remaining = len(request.tokens), len(request.pending), request.remaining
        num_draft = min(window, remaining - k) if intent.draft else 0
        # Rows the target judges: the pending tokens and one more, never past max_tokens.
        rows = min(k + intent.bonus, remaining) if intent.verify or (intent.draft and not num_draft) else 0
        target_end = length + rows - 1 if rows else request.target_computed
        draft_end, draft_written = self._draft.ends(request, num_draft)
        if lags and (chunks := self._chunks(plan, request, target_end, draft_end)):
            rows = num_draft = 0
            target_end, draft_end = chunks
            draft_written = draft_end
        if self._reserve(plan, request, target_end, draft_written):
            self._emit(plan, request, rows, num_draft, target_end, draft_end)
            if rows and num_draft and plan.pace.branches:
                plan.drafting.append(Drafting(request, len(plan.draft.work) - 1, window, rows > k))

    def _chunks(self, plan: RoundPlan, request: Request, target_end: int, draft_end: int) -> tuple[int, int] | None:
        """Where both forwards end instead, if a model cannot come as far as the method wants; None if both can.

        One model still computes the prompt. The other waits when it is done: then every token is decided in the same
        way however the prompts were cut, and a seeded output does not depend on the batch.
        """
        target_lag, draft_lag = target_end - request.target_computed, draft_end - request.draft_computed
        target_share, draft_share = plan.target_shares.get(request.id, 0), plan.draft_shares.get(request.id, 0)
        target_ready = target_lag <= max(target_share, len(request.pending) + 1)
        draft_ready, draft_chunk = self._draft.progress(draft_lag, draft_share)
        if target_ready and draft_ready:
            return None
        target_chunk = 0 if target_ready else target_share
        # Never into the last committed token or the pending ones: the target computes those only to judge them.
        return min(request.target_computed + target_chunk, request.length - 1), request.draft_computed + draft_chunk

    def _reserve(self, plan: RoundPlan, request: Request, target_end: int, draft_end: int) -> bool:
        """Reserve pages for both models, preempting later requests as needed; False: the request itself had to go."""
        target_copies: tuple[PageCopy, ...] = ()
        draft_copies: tuple[PageCopy, ...] = ()
        while request.lane >= 0:
            try:  # what was reserved before a preemption is reserved again at once, with nothing more to copy
                if target_end > request.target_computed:
                    target_copies += self.target_kv.reserve(request.id, target_end, request.target_computed)
                if self.draft_kv is not None and draft_end > request.draft_computed:
                    draft_copies += self.draft_kv.reserve(request.id, draft_end, request.draft_computed)
            except OutOfPages:
                victim = self.running[-1]  # not planned yet in this round, or the request itself
                self._preempt(victim)
                plan.preempted.append(victim.id)
            else:
                plan.target_copies += target_copies
                plan.draft.copies += draft_copies
                return True
        return False

    def _emit(
        self, plan: RoundPlan, request: Request, rows: int, num_draft: int, target_end: int, draft_end: int
    ) -> None:
        state = request.state(with_history=self._drafter_reads_history or request.params.changes_logits)
        start = request.target_computed
        if target_end > start:
            logits = rows
            if request.prompt_logprobs and (wanted := request.prompt_logprobs.wanted(request.id, start, target_end)):
                plan.prompts.append(wanted)
                logits += len(wanted.tokens)
            table, tokens = self.target_kv.block_table(request.id), request.token_range(start, target_end)
            plan.target.append(ForwardWork(state, tokens, start, logits, table))
        if rows:
            plan.verify.append(VerifyWork(request.id, request.pending, len(request.tokens), request.pinned))
        start = request.draft_computed
        if num_draft or draft_end > start:
            table = self.draft_kv.block_table(request.id) if self.draft_kv else ()
            tokens, pending = self._draft.tokens(request, start, draft_end)
            forward = ForwardWork(state, tokens, start, 1 if num_draft else 0, table)
            plan.draft.work.append(DraftWork(forward, num_draft, (), pending, request.slot))

    def _admit(self) -> None:
        while self.waiting and self._free_lanes:
            request = self.waiting[0]
            # Nothing of a request that is not drafted for ever lies in the draft's KV.
            pools = [kv for kv in (self.target_kv, self.draft_kv if request.params.draft else None) if kv]
            # Room for all it has now: a request admitted into less would be preempted before its first token.
            needed = -(-(request.length + 1) // self.target_kv.page_size)
            if self.running and any(kv.num_free_pages < needed for kv in pools):
                return
            target_cached, draft_cached = self._draft.begin(request, self.target_kv)
            self.waiting.popleft()
            request.start_running(self._free_lanes.pop(), target_cached, draft_cached)
            self.running.append(request)

    def _preempt(self, request: Request) -> None:
        self._release(request)
        request.preempt()
        self.waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        if self.branches is not None:
            self.branches.release(request)
        self._free_lanes.append(request.lane)
        for kv in filter(None, (self.target_kv, self.draft_kv)):
            kv.free(request.id)

    def update(
        self, request: Request, target: ForwardWork | None, draft: DraftWork | None, result: VerifyResult
    ) -> tuple[int, ...]:
        """Commit and roll back what a round did for one request. Returns its newly committed tokens."""
        request_id = request.id
        window, decision = result.windows.get(request_id, ()), result.decisions.get(request_id)
        ahead = self.branches.settle(request, result) if self.branches is not None else ()
        if request.prompt_logprobs is not None and (found := result.prompts.get(request_id)) is not None:
            request.prompt_logprobs.add(found)
        committed = request.apply(target, draft, window, decision, ahead)
        self.target_kv.settle(request_id, request.tokens, request.target_computed)
        self._draft.settle(request)
        return committed

    def finish(self, request_id: int) -> Request:
        """Remove a request in any state (finished, aborted, failed) and free what it holds."""
        request = self.requests.pop(request_id)
        if request.status is Status.RUNNING:
            self._release(request)
        else:
            self.waiting.remove(request)
        request.finish()
        return request


def _beside_plain(batch: Sequence[Request], pace: Pace, intents: Sequence[Intent]) -> tuple[list[Intent], list[int]]:
    """Intents and windows of the whole batch; ``intents``: of those that are drafted for, as are the pace's windows."""
    own, plain = zip(intents, pace.windows, strict=True), (plain_intent(pace.mode, intents), 1)
    every = [next(own) if request.params.draft else plain for request in batch]
    return [intent for intent, _ in every], [window for _, window in every]


def require_room(count: int, free_lanes: int, waiting: int, max_waiting: int) -> None:
    """QueueFullError unless ``count`` more requests may come where so many wait."""
    room = max(0, free_lanes + max_waiting - waiting)
    if count <= room:
        return
    if count == 1:
        raise QueueFullError(f"{waiting - free_lanes} requests are waiting, the limit (max_waiting); try again later")
    raise QueueFullError(
        f"{count} requests at once, but there is room for {room}: {free_lanes} lanes are free, and {max_waiting} may "
        "wait (max_waiting); bring fewer at a time or raise max_waiting"
    )

"""The engine: one round after another, the same for every decoding method."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from pearl.drafting import Drafter
from pearl.engine.failures import ends_engine
from pearl.engine.judge import Judge
from pearl.engine.request import Request
from pearl.engine.scheduler import Scheduler
from pearl.errors import EngineClosedError
from pearl.messages import (
    Busy,
    Decision,
    DraftPlan,
    DraftProposal,
    Interval,
    SchedulerOutput,
    TargetOutput,
    TargetPlan,
    VerifyResult,
)
from pearl.outputs import OutputDelta
from pearl.pace import MeasuredRound, PacePolicy, Progressed
from pearl.workers import Reply, TargetRunner, Worker

_CUT_IN_TWO = "a round was cut in two, so that this engine cannot go on; close it and build a new one"
_CANNOT_GO_ON = "this engine cannot go on; close it and build a new one, after an error of CUDA in a new process"


@dataclass(frozen=True)
class EngineStats:
    """Since the engine was built."""

    rounds: int = 0
    preparations: int = 0  # graphs captured and kernels compiled in them: more than a few means that shapes thrash


@dataclass(frozen=True)
class RoundRecord:
    """One finished round, for observers: benchmarks, timelines, metrics."""

    plan: SchedulerOutput
    proposal: DraftProposal
    target: Interval
    result: VerifyResult
    whole: Interval
    preparations: int = 0  # graphs captured and kernels compiled on the way: such a round takes longer, but once


class Engine:
    """Belongs to one thread. Owns the scheduler; talks to the workers in frozen messages only."""

    def __init__(
        self,
        scheduler: Scheduler,
        target: TargetRunner,
        target_worker: Worker,
        drafter: Drafter | None,
        draft_worker: Worker | None,
        verifier: Judge,
        pace: PacePolicy,
        observer: Callable[[RoundRecord], None] | None = None,
        draft_alone: Worker | None = None,
        preparations: Callable[[], int] = lambda: 0,
    ) -> None:
        """``draft_alone``: where the draft works in rounds without the target; None: where it always does.
        ``preparations``: how many graphs were captured and kernels compiled so far; asked between rounds.
        """
        self.scheduler = scheduler
        self.observer = observer
        self._target, self._target_worker = target, target_worker
        self._drafter, self._draft_worker = drafter, draft_worker
        self._draft_alone = draft_alone or draft_worker
        self._verifier, self._pace = verifier, pace
        self._closed = False
        self._broken: str | None = None  # why no round can follow
        self._cause: BaseException | None = None  # of that, where it is an error
        self._preparations, self._prepared = preparations, preparations()
        self.stats = EngineStats()
        self._outbox: list[OutputDelta] = []
        # Pending tokens may be judged in a round without drafting: their rows are those of the latest proposal.
        self._latest = DraftProposal()

    def add(self, request: Request) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed; build a new one")
        self._require_whole()
        self.scheduler.add(request)

    def _require_whole(self) -> None:
        if self._broken is not None:
            raise EngineClosedError(self._broken) from self._cause

    @property
    def failure(self) -> str | None:
        """Why no round can follow; None while one can."""
        return self._broken

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def step(self) -> list[OutputDelta]:
        """One round: plan, let both models work at the same time, meet once, commit or roll back.

        Returns what ``take`` does. An exception in a worker fails the requests of that round, one in the making of an
        output that request alone, each with an ``OutputDelta.error``; the others go on. An error that leaves a device
        unusable ends all requests so, and the engine: EngineClosedError from then on. What an observer raises, and an
        interruption, passes through; the outputs then wait for ``take``.
        """
        self._require_whole()
        begin = time.perf_counter()
        plan: SchedulerOutput | None = None
        try:
            plan = self.scheduler.schedule()
            proposal, target = self._run(plan)
            result = self._verifier.verify(plan, proposal, target)
            self._target.check()
        except BaseException as error:  # nothing of the round was applied
            self._fail(plan, error)
            if not isinstance(error, Exception):
                raise
            return self.take()
        self._commit(plan, result)
        record = RoundRecord(plan, proposal, target.busy, result, Busy.since(begin), self._count_round())
        self._learn(record)
        if self.observer is not None:
            self.observer(record)
        return self.take()

    def _count_round(self) -> int:
        """What was prepared since the last one."""
        before, self._prepared = self._prepared, self._preparations()
        new = self._prepared - before
        self.stats = EngineStats(self.stats.rounds + 1, self.stats.preparations + new)
        return new

    def take(self) -> list[OutputDelta]:
        """What rounds, ``abort`` and ``close`` have added to outputs since the last call, in order."""
        outputs, self._outbox = self._outbox, []
        return outputs

    def _commit(self, plan: SchedulerOutput, result: VerifyResult) -> None:
        """Apply the round to each of its requests, each by itself."""
        self._broken = _CUT_IN_TWO
        target = {work.state.request_id: work for work in plan.target.work}
        draft = {work.forward.state.request_id: work for work in plan.draft.work}
        for request_id in target | draft:
            try:
                request, decision = self.scheduler.requests[request_id], result.decisions.get(request_id)
                committed = self.scheduler.update(request, target.get(request_id), draft.get(request_id), result)
                if decision is None:
                    continue
                if decision.error is not None:
                    self.abort(request_id, decision.error)
                else:
                    self._outbox.append(self._output(request, committed, decision))
            except Exception as error:  # of this request; the others have their tokens all the same
                self.abort(request_id, _sentence(error))
        self._broken = None

    def _run(self, plan: SchedulerOutput) -> tuple[DraftProposal, TargetOutput]:
        """Let both work. Whichever would keep this very thread busy comes last, or the other would begin after it."""
        target_first = self._drafter is not None and not self._target_worker.blocks and self._drafter.waits(plan.draft)
        target = self._submit_target(plan.target) if target_first else None
        draft: Reply[DraftProposal] | None = None
        try:
            draft = self._submit_draft(plan.draft, self._draft_worker if plan.target.work else self._draft_alone)
            target = target or self._submit_target(plan.target)
            output = target.result() if target else TargetOutput(None)
        finally:  # both must be at rest before anyone touches their KV again
            proposal = draft.result() if draft else self._latest
        self._latest = DraftProposal(logits=proposal.logits, stored=proposal.stored)
        return proposal, output

    def _submit_target(self, plan: TargetPlan) -> Reply[TargetOutput] | None:
        return self._target_worker.submit(self._target.run, plan) if plan.work else None

    def _submit_draft(self, plan: DraftPlan, worker: Worker | None) -> Reply[DraftProposal] | None:
        if not plan.work:
            return None
        assert self._drafter is not None
        assert worker is not None
        return worker.submit(self._drafter.propose, plan)

    def run_target(self, plan: TargetPlan) -> TargetOutput:
        """Compute a plan on the target's worker while the draft rests: to measure a forward alone."""
        reply = self._submit_target(plan)
        output = reply.result() if reply else TargetOutput(None)
        self._target_worker.rest()
        return output

    def run_draft(self, plan: DraftPlan) -> DraftProposal:
        """Compute a plan on the draft's worker while the target rests."""
        reply = self._submit_draft(plan, self._draft_worker)
        if reply is None or self._draft_worker is None:
            return DraftProposal()
        proposal = reply.result()
        self._draft_worker.rest()
        return proposal

    def _output(self, request: Request, committed: tuple[int, ...], decision: Decision) -> OutputDelta:
        """Turn committed tokens into the caller's output, cut at its end."""
        kept, text, finish_reason = request.output.accept(committed)
        metrics = request.metrics
        request.count(decision, kept)
        if metrics.first_token_at is None:
            metrics.first_token_at = time.monotonic()
        drafted = ((True,) * decision.accepted + (False,))[:kept]  # one at most, the last, is the target's own
        logprobs = None if decision.logprobs is None else decision.logprobs[:kept]
        delta = OutputDelta(request.id, committed[:kept], drafted, text, logprobs, finish_reason, metrics)
        if finish_reason is not None:
            metrics.finished_at = time.monotonic()
            self.scheduler.finish(request.id)
        return delta

    def _learn(self, record: RoundRecord) -> None:
        """From a round like those to come: without prompts, preemptions, and what is prepared only once."""
        if not self._pace.listens:
            return
        plan = record.plan
        decoding = all(len(w.tokens) == w.num_logits for w in plan.target.work)
        if not decoding or any(len(w.forward.tokens) > 2 for w in plan.draft.work):
            return
        if record.preparations or plan.preempted:
            return
        try:
            self._pace.observe(_measured(record))
        except Exception as error:  # times are waited for: of a device that has failed since the verdict
            if not ends_engine(error):
                raise
            self._end(error)

    def _fail(self, plan: SchedulerOutput | None, error: BaseException) -> None:
        """End the requests of a round that was not applied; where none could be planned, all that run; all that there
        are where no device can be trusted any more.
        """
        self._broken = _CUT_IN_TWO
        fatal = error if ends_engine(error) else None
        for worker in filter(None, (self._target_worker, self._draft_worker)):
            try:
                worker.rest()
            except Exception as again:  # a device that failed for good raises at every wait
                fatal = fatal or again
        if fatal is not None:
            self._end(fatal)
            return
        if plan is None:  # without one that runs it was the next to run
            failed = {r.id for r in self.scheduler.running or list(self.scheduler.waiting)[:1]}
        else:
            failed = {w.state.request_id for w in plan.target.work} | {
                w.forward.state.request_id for w in plan.draft.work
            }
        for request_id in sorted(failed):
            self.abort(request_id, _sentence(error))
        self._broken = None

    def _end(self, error: BaseException) -> None:
        """No round can follow: every request is answered."""
        self._broken, self._cause = f"{_sentence(error)}\n{_CANNOT_GO_ON}", error
        for request_id in list(self.scheduler.requests):
            self.abort(request_id, _sentence(error))

    def abort(self, request_id: int, error: str | None = None) -> OutputDelta:
        """End a request now, whatever its state, and free what it holds. KeyError if it is not (or no longer) known."""
        request = self.scheduler.finish(request_id)
        request.metrics.finished_at = time.monotonic()
        delta = OutputDelta(request_id, (), (), "", None, "abort", request.metrics, error)
        self._outbox.append(delta)
        return delta

    def close(self) -> None:
        """Abort everything and end the workers. Idempotent."""
        self._closed = True
        for request_id in list(self.scheduler.requests):
            self.abort(request_id, "the engine was closed before this output had ended")
        for worker in (self._target_worker, self._draft_worker):
            if worker is not None:
                worker.close()


def _measured(record: RoundRecord) -> MeasuredRound:
    plan, proposal = record.plan, record.proposal
    assert plan.pace is not None
    assert plan.load is not None
    return MeasuredRound(
        mode=plan.pace.mode,
        load=plan.load,
        target_rows=sum(len(w.tokens) for w in plan.target.work),
        target_seconds=record.target.seconds,
        draft_sequences=len(plan.draft.work),
        draft_steps=max(1, proposal.steps),
        draft_seconds=proposal.busy.seconds,
        seconds=record.whole.seconds,
        requests=tuple(
            Progressed(request_id, len(d.tested), d.accepted, len(d.committed))
            for request_id, d in record.result.decisions.items()
        ),
    )


def _sentence(error: BaseException) -> str:
    words = str(error)
    return f"{type(error).__name__}: {words}" if words else type(error).__name__

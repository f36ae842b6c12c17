"""The engine: one round after another, the same for every decoding method."""

from __future__ import annotations

import time
from collections.abc import Callable

from pearl.engine.failures import ends_engine
from pearl.engine.judge import Judge
from pearl.engine.model_workers import ModelWorkers
from pearl.engine.outbox import Outbox, sentence
from pearl.engine.request import Request, Status
from pearl.engine.rounds import EngineStats, InFlight, RoundInterval, RoundRecord, measured
from pearl.engine.scheduler import Scheduler
from pearl.errors import EngineClosedError
from pearl.messages import (
    Busy,
    DraftPlan,
    DraftProposal,
    Interval,
    SchedulerOutput,
    TargetOutput,
    TargetPlan,
    VerifyResult,
)
from pearl.outputs import OutputDelta
from pearl.pace import PacePolicy

_CUT_IN_TWO = "a round was cut in two, so that this engine cannot go on; close it and build a new one"
_CLOSED = "the engine was closed before this output had ended"
_CANNOT_GO_ON = "this engine cannot go on; close it and build a new one, after an error of CUDA in a new process"


class Engine:
    """Belongs to one thread. Owns the scheduler; talks to the workers in frozen messages only.

    Where neither model keeps this thread busy, the next round is planned and set going as soon as a verdict is
    committed, and only then is the verdict made into outputs and shown to the observer. So between two steps a round
    may be in flight, whose requests may end meanwhile. They lose pages and lane at once, although the models still
    write to these: nobody gets either but in ``Scheduler.schedule``, which is called when the round has been collected,
    and what it found of them is dropped then. Where a model's worker *is* this thread, outputs come first: they would
    only be late.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        workers: ModelWorkers,
        verifier: Judge,
        pace: PacePolicy,
        observer: Callable[[RoundRecord], None] | None = None,
        preparations: Callable[[], int] = lambda: 0,
    ) -> None:
        """``preparations``: how many graphs were captured and kernels compiled so far; asked between rounds."""
        self.scheduler, self.workers = scheduler, workers
        self.observer = observer
        self._verifier, self._pace = verifier, pace
        self._closed = False
        self._broken: str | None = None  # why no round can follow
        self._cause: BaseException | None = None  # of that, where it is an error
        self._preparations, self._prepared = preparations, preparations()
        self.stats = EngineStats()
        self._outbox = Outbox(scheduler.finish)
        self._in_flight: InFlight | None = None
        self._left: float | None = None  # when a step left the round in flight, its observer apart; perf_counter()

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
        """Whether a request has not been answered. A round may be in flight without: nobody need wait for it."""
        return self.scheduler.has_work or not self._outbox.is_written

    def step(self) -> list[OutputDelta]:
        """One round: plan, let both models work at the same time, meet once, commit or roll back.

        Returns what ``take`` does. An exception in a worker fails the requests of that round, one in the making of an
        output that request alone, each with an ``OutputDelta.error``; the others go on. An error that leaves a device
        unusable ends all requests so, and the engine: EngineClosedError from then on. What an observer raises, and an
        interruption, passes through; the outputs then wait for ``take``.
        """
        self._require_whole()
        self._write()
        if self._in_flight is None:
            self._begin()
        record = None
        if (flight := self._in_flight) is not None:
            record = self._collect(flight)
            if self._can_overlap(flight.plan):
                self._begin()
        self._write()
        self._left = time.perf_counter() if self._in_flight else None
        if record is not None and self.observer is not None:
            self.observer(record)
        return self.take()

    def _can_overlap(self, plan: SchedulerOutput) -> bool:
        """Whether the next round runs by itself; it is taken to be of the same kind as ``plan``."""
        return self._broken is None and self.scheduler.has_work and self.workers.can_overlap(plan)

    def _begin(self) -> None:
        """Plan a round and set both models to work on it. Where that fails its requests end, and none is in flight."""
        begin, plan, self._left = time.perf_counter(), None, None
        try:
            plan = self.scheduler.schedule()
            self._in_flight = self.workers.submit(plan, begin)
        except BaseException as error:
            self._fail(plan, error)
            if not isinstance(error, Exception):
                raise

    def _collect(self, flight: InFlight) -> RoundRecord | None:
        """Wait for the round in flight and commit its verdict; None if it failed, or all of its requests have ended."""
        plan, back = flight.plan, time.perf_counter()
        try:
            proposal, target = self.workers.collect(flight)
            result = self._verifier.verify(plan, proposal, target)
            self.workers.target.check()
            self._in_flight = None
        except BaseException as error:  # nothing of the round was applied
            self._fail(plan, error)
            if not isinstance(error, Exception):
                raise
            return None
        wanted = self._commit(plan, result)
        whole: Interval = Busy(flight.begin, time.perf_counter() - flight.begin)
        if self._left is not None:  # the step before this one began it
            whole = RoundInterval(flight.begin, time.perf_counter(), self._left, back, (proposal.busy, target.busy))
        record = RoundRecord(plan, proposal, target.busy, result, whole, self._count_round())
        if not wanted:
            return None
        self._learn(record)
        return record

    def _count_round(self) -> int:
        """What was prepared since the last one."""
        before, self._prepared = self._prepared, self._preparations()
        new = self._prepared - before
        self.stats = EngineStats(self.stats.rounds + 1, self.stats.preparations + new)
        return new

    def rest(self) -> None:
        """Collect the round in flight, if there is one: then both workers are at rest. Outputs wait for ``take``."""
        if self._broken is None and self._in_flight is not None:
            record = self._collect(self._in_flight)
            if record is not None and self.observer is not None:
                self.observer(record)

    def take(self) -> list[OutputDelta]:
        """What rounds, ``abort`` and ``close`` have added to outputs since the last call, in order."""
        self._write()
        return self._outbox.take()

    def _write(self) -> None:
        """Make outputs of what is committed, each by itself."""
        if self._broken is None and not self._outbox.is_written:
            self._broken = _CUT_IN_TWO
            self._outbox.write()
            self._broken = None

    def _commit(self, plan: SchedulerOutput, result: VerifyResult) -> bool:
        """Apply the round to each of its requests, each by itself. False: none of them is left."""
        self._broken = _CUT_IN_TWO
        for preempted in filter(None, map(self.scheduler.requests.get, plan.preempted)):
            preempted.end_run()  # what was committed before is counted by now
        target = {work.state.request_id: work for work in plan.target.work}
        draft = {work.forward.state.request_id: work for work in plan.draft.work}
        requests, running, left = self.scheduler.requests, Status.RUNNING, plan.is_empty
        for request_id in target | draft:
            request = requests.get(request_id)
            if request is None or request.status is not running:  # it ended while the round was in flight
                continue
            left = True
            try:
                decision = result.decisions.get(request_id)
                committed = self.scheduler.update(request, target.get(request_id), draft.get(request_id), result)
                if decision is None:
                    continue
                if decision.error is not None:
                    self._outbox.give_up(request, decision.error)
                else:
                    self._outbox.put(request, committed, decision)
            except Exception as error:  # of this request; the others have their tokens all the same
                self._outbox.give_up(request, sentence(error))
        self._broken = None
        return left

    def run_target(self, plan: TargetPlan) -> TargetOutput:
        """Compute a plan on the target's worker while the draft rests: to measure a forward alone. A drafter that reads
        hidden states finds them in the next ``run_draft``, as in the next round.
        """
        self.rest()
        return self.workers.run_target(plan)

    def run_draft(self, plan: DraftPlan) -> DraftProposal:
        """Compute a plan on the draft's worker while the target rests."""
        self.rest()
        return self.workers.run_draft(plan)

    def _learn(self, record: RoundRecord) -> None:
        """From a round like those to come: without prompts, preemptions, and what is prepared only once."""
        plan = record.plan
        if not self._pace.listens or plan.load is None:
            return
        decoding = all(len(w.tokens) == w.num_logits for w in plan.target.work)
        most = self.workers.most_behind
        if not decoding or plan.target.prompts or any(len(w.forward.tokens) > most for w in plan.draft.work):
            return
        if record.preparations or plan.preempted:
            return
        try:
            self._pace.observe(measured(record))
        except Exception as error:  # times are waited for: of a device that has failed since the verdict
            if not ends_engine(error):
                raise
            self._end(error)

    def _fail(self, plan: SchedulerOutput | None, error: BaseException) -> None:
        """End the requests of a round that was not applied; where none could be planned, all that run; all that there
        are where no device can be trusted any more.
        """
        self._write()
        self._broken, self._in_flight = _CUT_IN_TWO, None
        again = self.workers.give_up()
        fatal = error if ends_engine(error) else again
        if fatal is not None:
            self._end(fatal)
            return
        if plan is not None:
            planned = {w.state.request_id for w in plan.target.work} | {
                w.forward.state.request_id for w in plan.draft.work
            }
            failed = [r for r in self.scheduler.running if r.id in planned]
        else:  # without one that runs it was the next to run
            failed = self.scheduler.running.copy() or list(self.scheduler.waiting)[:1]
        for request in failed:
            self._outbox.give_up(request, sentence(error))
        self._broken = None

    def _end(self, error: BaseException) -> None:
        """No round can follow: every request is answered."""
        self._write()
        self._broken, self._cause = f"{sentence(error)}\n{_CANNOT_GO_ON}", error
        for request in list(self.scheduler.requests.values()):
            self._outbox.give_up(request, sentence(error))

    def abort(self, request_id: int, error: str | None = None) -> OutputDelta:
        """End a request now, whatever its state, and free what it holds. KeyError if it is not (or no longer) known."""
        self._write()
        return self._outbox.give_up(self.scheduler.requests[request_id], error)

    def close(self) -> None:
        """Abort everything and end the workers. Idempotent."""
        self._closed = True
        self._write()
        self._outbox.drop(_CLOSED)  # what an interruption cut in two
        for request in list(self.scheduler.requests.values()):
            self._outbox.give_up(request, _CLOSED)
        flight, self._in_flight = self._in_flight, None
        self.workers.close(flight is not None)

"""Engine.step with real worker threads and fake models: concurrency, failures, observers, shutdown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_sim import SimulatedVerifier, drafted, request_of

from pearl.engine.engine import Engine, EngineStats, RoundRecord
from pearl.engine.request import Status
from pearl.engine.scheduler import Scheduler
from pearl.errors import EngineClosedError
from pearl.kv import KVCacheManager
from pearl.messages import DraftPlan, DraftProposal, SchedulerOutput, TargetOutput, TargetPlan, VerifyResult
from pearl.outputs import OutputDelta
from pearl.pace import Load, MeasuredRound, Pace, Progressed
from pearl.workers import HostQueue, InlineWorker, ThreadWorker, Worker

TOKEN = 5  # what both fakes always say


class FakeTarget:
    def __init__(self) -> None:
        self.before: Callable[[TargetPlan], Any] = lambda plan: None
        self.check: Callable[[], None] = lambda: None

    def run(self, plan: TargetPlan) -> TargetOutput:
        self.before(plan)
        return TargetOutput(torch.full((sum(work.num_logits for work in plan.work),), TOKEN))


class FakeDrafter:
    reads_history = False

    def __init__(self) -> None:
        self.before: Callable[[DraftPlan], Any] = lambda plan: None

    def waits(self, plan: DraftPlan) -> bool:
        return False

    def propose(self, plan: DraftPlan) -> DraftProposal:
        self.before(plan)
        windows = {item.forward.state.request_id: drafted(*[TOKEN] * item.num_draft) for item in plan.work}
        return DraftProposal(windows, steps=max(item.num_draft for item in plan.work))


class FakeVerifier(SimulatedVerifier):
    def __init__(self) -> None:
        self.before: Callable[[], Any] = lambda: None

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        self.before()
        return super().verify(plan, proposal, target)


class RecordingPace:
    changes = True

    def __init__(self, mode: str) -> None:
        self.mode, self.size = mode, 2
        self.batches: list[int] = []
        self.measured: list[MeasuredRound] = []

    def decide(self, request_ids: Sequence[int], load: Load, pinned: bool) -> Pace:
        self.batches.append(load.batch)
        return Pace(self.mode, (self.size,) * load.batch)  # type: ignore[arg-type]

    def observe(self, measured: MeasuredRound) -> None:
        self.measured.append(measured)


class Rig:
    def __init__(
        self, method: str = "pearl", lanes: int = 4, budget: int = 64, draft_alone: Worker | None = None
    ) -> None:
        self.target, self.drafter, self.verifier = FakeTarget(), FakeDrafter(), FakeVerifier()
        self.pace = RecordingPace(method)
        self.records: list[RoundRecord] = []
        self.prepared = 5  # before the engine was built
        self.workers = [ThreadWorker("target", 1), ThreadWorker("draft", 1)]
        self.scheduler = Scheduler(
            self.pace,
            KVCacheManager(64, 4),
            KVCacheManager(64, 4),
            max_num_seqs=lanes,
            max_num_batched_tokens=budget,
            max_waiting=100,
        )
        self.engine = Engine(
            self.scheduler,
            self.target,  # type: ignore[arg-type]
            self.workers[0],
            self.drafter,
            self.workers[1],
            self.verifier,  # type: ignore[arg-type]
            self.pace,
            self.records.append,
            draft_alone,
            lambda: self.prepared,
        )

    def add(self, *ids: int, max_tokens: int = 9, length: int = 3) -> None:
        for request_id in ids:
            self.engine.add(request_of(request_id, [1] * length, max_tokens))

    def run(self) -> dict[int, list[OutputDelta]]:
        deltas: dict[int, list[OutputDelta]] = {}
        while self.engine.has_work:
            for delta in self.engine.step():
                deltas.setdefault(delta.request_id, []).append(delta)
        return deltas

    def check_empty(self) -> None:
        assert not self.scheduler.requests
        for kv in (self.scheduler.target_kv, self.scheduler.draft_kv):
            assert kv is not None
            assert kv.num_free_pages == 64
            kv.check_integrity()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.engine.close()


def tokens_of(deltas: list[OutputDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def fail(*args: object) -> None:
    raise RuntimeError("out of luck")


@pytest.mark.parametrize("inline", [False, True])
def test_the_draft_works_elsewhere_in_rounds_without_the_target(inline: bool) -> None:
    """Waking a thread only to wait for it costs a tenth of a short round."""
    rig = Rig("whole-windows", draft_alone=InlineWorker(HostQueue(torch.device("cpu"))) if inline else None)
    threads: list[str] = []
    rig.drafter.before = lambda plan: threads.append(threading.current_thread().name)
    rig.add(0)
    rig.run()
    alone = [not record.plan.target.work for record in rig.records if record.plan.draft.work]
    here = threading.current_thread().name
    assert threads == [here if inline and by_itself else "pearl-draft" for by_itself in alone]
    assert {True, False} <= set(alone)
    rig.engine.close()


def test_draft_and_target_run_at_the_same_time(rig: Rig) -> None:
    """Each waits for the other inside its forward: one after the other would break the barrier."""
    meeting = threading.Barrier(2, timeout=20)
    rig.target.before = rig.drafter.before = lambda plan: meeting.wait()
    rig.add(1, max_tokens=6)  # every round works on both sides until the last one, which only verifies
    for _ in range(2):
        assert all(delta.error is None for delta in rig.engine.step())
    assert rig.records[-1].plan.target.work
    assert rig.records[-1].plan.draft.work


@pytest.mark.parametrize("broken", ["target", "drafter", "verifier"])
def test_a_failing_round_ends_its_requests_with_the_error_and_no_others(rig: Rig, broken: str) -> None:
    rig.scheduler._free_lanes = rig.scheduler._free_lanes[:2]  # the third request is not part of the round
    rig.add(1, 2, 3)
    rig.engine.step()
    part = getattr(rig, broken)
    healthy, part.before = part.before, fail
    deltas = rig.engine.step()
    assert [(d.request_id, d.finish_reason, d.error, d.token_ids) for d in deltas] == [
        (i, "abort", "RuntimeError: out of luck", ()) for i in (1, 2)
    ]
    assert rig.scheduler.requests.keys() == {3}
    part.before = healthy
    assert tokens_of(rig.run()[3]) == [TOKEN] * 9
    rig.check_empty()


@pytest.mark.parametrize("broken", ["target", "drafter"])
def test_a_failing_round_of_one_model_alone_ends_its_requests(broken: str) -> None:
    rig = Rig("speculative")  # where they take turns
    try:
        rig.add(1)
        rig.engine.step()
        getattr(rig, broken).before = fail
        errors = [(d.request_id, d.error) for _ in range(3) for d in rig.engine.step() if d.error]
        assert errors == [(1, "RuntimeError: out of luck")]
        rig.check_empty()
    finally:
        rig.engine.close()


def test_a_request_that_cannot_be_committed_ends_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.add(1, 2, 3)
    rig.engine.step()
    monkeypatch.setattr(rig.scheduler.requests[2], "apply", fail)
    deltas = {delta.request_id: delta for delta in rig.engine.step()}
    assert (deltas[2].finish_reason, deltas[2].error) == ("abort", "RuntimeError: out of luck")
    assert deltas[1].token_ids == deltas[3].token_ids != ()
    rest = rig.run()
    assert len(tokens_of(rest[1])) == len(tokens_of(rest[3])) > 0
    rig.check_empty()


def test_a_round_that_cannot_be_planned_ends_what_runs_and_what_waits_goes_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.scheduler._free_lanes = rig.scheduler._free_lanes[:1]
    rig.add(1, 2)
    rig.engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(rig.scheduler, "_plan_batch", fail)
        (delta,) = rig.engine.step()
        assert (delta.request_id, delta.error) == (1, "RuntimeError: out of luck")
    assert tokens_of(rig.run()[2]) == [TOKEN] * 9
    rig.check_empty()


def test_a_request_that_cannot_be_admitted_ends_where_nothing_runs(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it would be tried for ever."""
    rig.add(1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(rig.scheduler, "_admit", fail)
        (delta,) = rig.engine.step()
        assert (delta.request_id, delta.error) == (1, "RuntimeError: out of luck")
    assert tokens_of(rig.run()[2]) == [TOKEN] * 9
    rig.check_empty()


def test_what_an_observer_raises_passes_through_and_loses_no_output(rig: Rig) -> None:
    rig.add(1)
    rig.engine.observer = fail
    with pytest.raises(RuntimeError):
        rig.engine.step()
    (delta,) = rig.engine.take()
    assert delta.token_ids == (TOKEN,)
    assert rig.engine.take() == []


@pytest.mark.parametrize("where", ["target", "drafter", "verifier"])
def test_an_interruption_within_a_round_undoes_it(rig: Rig, where: str) -> None:
    """Before anything was committed: its requests end with an error, and the engine goes on."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    rig.add(1)
    rig.engine.step()
    part = getattr(rig, where)
    healthy, part.before = part.before, interrupt
    with pytest.raises(KeyboardInterrupt):
        rig.engine.step()
    part.before = healthy
    assert [(d.request_id, d.error) for d in rig.engine.take()] == [(1, "KeyboardInterrupt")]
    rig.check_empty()
    rig.add(2)
    assert tokens_of(rig.run()[2]) == [TOKEN] * 9


def test_an_interruption_of_a_commit_ends_the_engine(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C can do that. Nobody waits for ever, and nothing is computed on pages that nobody knows."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    rig.add(1)
    rig.engine.step()
    monkeypatch.setattr(rig.scheduler.requests[1], "apply", interrupt)
    with pytest.raises(KeyboardInterrupt):
        rig.engine.step()
    with pytest.raises(EngineClosedError, match="build a new one"):
        rig.engine.step()
    rig.engine.close()
    assert [(d.request_id, d.finish_reason) for d in rig.engine.take()] == [(1, "abort")]


def test_a_verdict_on_a_target_that_was_lost_meanwhile_is_not_believed(rig: Rig) -> None:
    rig.add(1)
    rig.engine.step()
    rig.target.check = fail
    (delta,) = rig.engine.step()
    assert (delta.error, delta.token_ids) == ("RuntimeError: out of luck", ())
    rig.check_empty()


def test_after_a_failure_both_workers_are_at_rest(rig: Rig) -> None:
    """The draft fails at once; step must still wait for the target, whose pages are freed next."""
    failed, finished = threading.Event(), threading.Event()

    def fail_first(plan: DraftPlan) -> None:
        failed.set()
        fail()

    def finish_later(plan: TargetPlan) -> None:
        assert failed.wait(20)
        finished.set()

    rig.drafter.before, rig.target.before = fail_first, finish_later
    rig.add(1)
    assert rig.engine.step()[0].error == "RuntimeError: out of luck"
    assert finished.is_set()


def test_the_engine_goes_on_after_a_failure_with_new_requests(rig: Rig) -> None:
    rig.target.before = fail
    rig.add(1)
    assert rig.run()[1][-1].error is not None
    rig.target.before = lambda plan: None
    rig.add(2)
    assert tokens_of(rig.run()[2]) == [TOKEN] * 9
    rig.check_empty()


def test_observer_sees_every_finished_round_once(rig: Rig) -> None:
    rig.add(1, 2)
    steps = 0
    while rig.engine.has_work:
        rig.engine.step()
        steps += 1
        assert len(rig.records) == steps
    committed = [d.committed for r in rig.records for i, d in r.result.decisions.items() if i == 1]
    assert [token for tokens in committed for token in tokens] == [TOKEN] * 9
    assert all(not record.plan.is_empty for record in rig.records)


def test_deltas_mark_drafted_tokens_and_the_first_token_time(rig: Rig) -> None:
    rig.drafter.propose = lambda plan: DraftProposal({1: drafted(TOKEN, 6)})  # type: ignore[method-assign]
    rig.add(1, max_tokens=8)
    deltas = rig.run()[1]
    assert [(d.token_ids, d.drafted) for d in deltas[:2]] == [((TOKEN,), (True,)), ((TOKEN,), (False,))]
    assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]
    metrics = deltas[-1].metrics
    assert metrics.first_token_at is not None
    assert metrics.finished_at is not None
    assert metrics.arrival <= metrics.first_token_at <= metrics.finished_at


def test_window_learns_from_decoding_rounds_only() -> None:
    rig = Rig(budget=4)
    rig.add(1, length=12)
    rig.run()
    prefill = sum(1 for record in rig.records if any(len(w.tokens) != w.num_logits for w in record.plan.target.work))
    assert prefill > 1
    assert len(rig.pace.measured) == len(rig.records) - prefill
    first = rig.pace.measured[0]
    assert (first.mode, first.load.batch, first.draft_steps, first.target_rows) == ("pearl", 1, 2, 2)
    assert first.requests == (Progressed(1, 2, 2, 2),)
    rig.engine.close()


def test_window_does_not_learn_from_rounds_in_which_the_draft_catches_up(rig: Rig) -> None:
    """As after plain decoding, when the target has no prompt to compute."""
    rig.add(1, length=9, max_tokens=30)
    for _ in range(3):
        rig.engine.step()
    learned = len(rig.pace.measured)
    for behind in (0, 6, 0):
        rig.scheduler.requests[1].draft_computed -= behind
        rig.engine.step()
        plan = rig.records[-1].plan
        assert all(len(work.tokens) == work.num_logits for work in plan.target.work)
        assert (len(plan.draft.work[0].forward.tokens) > 2) == bool(behind)
        learned += not behind
        assert len(rig.pace.measured) == learned


def test_window_does_not_learn_from_rounds_that_prepared_something(rig: Rig) -> None:
    """A graph that is captured, or a kernel that is compiled, takes a hundred times as long as the round."""
    rig.add(1, max_tokens=30)
    rig.engine.step()
    learned = len(rig.pace.measured)
    for new in (0, 2, 0, 0, 1):
        rig.prepared += new
        rig.engine.step()
        learned += new == 0
        assert len(rig.pace.measured) == learned
        assert rig.records[-1].preparations == new
    assert rig.engine.stats == EngineStats(rounds=6, preparations=3)


def test_window_does_not_learn_from_rounds_with_a_preemption(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.add(1, max_tokens=30)
    rig.engine.step()
    schedule, learned = rig.scheduler.schedule, len(rig.pace.measured)
    for preempted in ((), (7,), (), (8, 9)):
        monkeypatch.setattr(rig.scheduler, "schedule", lambda gone=preempted: replace(schedule(), preempted=gone))
        rig.engine.step()
        learned += not preempted
        assert len(rig.pace.measured) == learned


def test_window_is_asked_for_the_batch_at_hand(rig: Rig) -> None:
    rig.add(1)
    rig.engine.step()
    rig.add(2, 3)
    rig.engine.step()
    assert rig.pace.batches == [1, 3]


def test_close_aborts_everything_ends_the_threads_and_may_be_repeated() -> None:
    before = set(threading.enumerate())
    rig = Rig()
    rig.add(1, 2)
    rig.engine.step()
    request = rig.scheduler.requests[1]
    assert len(set(threading.enumerate()) - before) == 2
    rig.engine.close()
    rig.engine.close()
    assert set(threading.enumerate()) <= before
    assert request.status is Status.FINISHED
    assert not rig.engine.has_work
    rig.check_empty()


def test_add_after_close_is_refused() -> None:
    rig = Rig()
    rig.engine.close()
    with pytest.raises(EngineClosedError, match="the engine is closed; build a new one"):
        rig.add(1)
    assert not rig.engine.has_work


def test_a_step_without_work_does_nothing(rig: Rig) -> None:
    assert rig.engine.step() == []
    assert rig.records[-1].plan.is_empty

"""Engine.step with real worker threads and fake models: concurrency, failures, observers, shutdown."""

from __future__ import annotations

import threading

import pytest
import torch
from engine_requests import drafted
from engine_rig import TOKEN, Rig, fail, tokens_of

from pearl.engine.request import Status
from pearl.errors import EngineClosedError
from pearl.messages import DraftPlan, DraftProposal, TargetPlan
from pearl.workers import HostQueue, InlineWorker


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
    rig.settle()
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
        rig.settle()
        getattr(rig, broken).before = fail
        errors = [(d.request_id, d.error) for _ in range(3) for d in rig.engine.step() if d.error]
        assert errors == [(1, "RuntimeError: out of luck")]
        rig.check_empty()
    finally:
        rig.engine.close()


def test_a_request_that_cannot_be_committed_ends_alone(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.add(1, 2, 3)
    rig.settle()
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
    rig.settle()
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
    rig.settle()
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
    rig.settle()
    monkeypatch.setattr(rig.scheduler.requests[1], "apply", interrupt)
    with pytest.raises(KeyboardInterrupt):
        rig.engine.step()
    with pytest.raises(EngineClosedError, match="build a new one"):
        rig.engine.step()
    rig.engine.close()
    assert [(d.request_id, d.finish_reason) for d in rig.engine.take()] == [(1, "abort")]


def test_a_verdict_on_a_target_that_was_lost_meanwhile_is_not_believed(rig: Rig) -> None:
    rig.add(1)
    rig.settle()
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

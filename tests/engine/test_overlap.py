"""A round in flight between two steps: what is made while it runs, and what becomes of it when its requests end.

Workers are asynchronous in one thread (``LateWorker``): a model works when its result is asked for, and pages may not
move before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from engine_rig import fail
from engine_sim import Simulation, expected_output, request_of, simulate

from pearl.driver import Driver, Reader
from pearl.engine.request import Request
from pearl.errors import EngineClosedError, RankError
from pearl.gate import Gate
from pearl.messages import Busy, DraftPlan, SchedulerOutput, TargetOutput, VerifyResult
from pearl.outputs import OutputDelta
from pearl.sampling_params import SamplingParams

Log = list[tuple[str, str]]
PROMPT = [3, 1, 4, 1, 5]
LONG = SamplingParams(max_tokens=40, ignore_eos=True)


def overlapping(log: Log | None = None, **options: Any) -> Simulation:
    return simulate(overlaps=True, log=log, **{"accuracy": 0.8, "prefix_caching": False, **options})


def request(request_id: int, params: SamplingParams = LONG, prompt: list[int] = PROMPT) -> Request:
    return request_of(request_id, [*prompt, request_id], params.max_tokens, params=params, eos_ids=())


def expected(request_id: int, params: SamplingParams = LONG) -> tuple[list[int], str, str | None]:
    return expected_output([*PROMPT, request_id], params.max_tokens, params)


def stopping(request_id: int, token: int) -> SamplingParams:
    """Ends with the stop string that token number ``token`` of the output completes, and no token before."""
    tokens, _, _ = expected(request_id)
    stop = "".join(f"<{t}>" for t in tokens[token - 2 : token + 1])
    params = replace(LONG, stop=stop)
    assert expected(request_id, params)[0] == tokens[: token + 1]
    return params


def in_flight(simulation: Simulation) -> bool:
    return all(worker.is_busy for worker in simulation.scheduler.workers)


def note(log: Log, owner: object, name: str, what: str) -> None:
    """Write down when a method is called."""
    call = getattr(owner, name)

    def noted(*args: Any) -> Any:
        log.append(("engine", what))
        return call(*args)

    setattr(owner, name, noted)


def pages_held(simulation: Simulation) -> int:
    return sum(kv.num_pages - kv.num_free_pages for kv in simulation.pools)


# What is done when


@pytest.mark.parametrize("overlaps", [False, True])
def test_outputs_are_made_between_the_begin_of_the_next_round_and_the_wait_for_it(overlaps: bool) -> None:
    log: Log = []
    simulation = overlapping(log) if overlaps else simulate()
    simulation.add(request(1))
    note(log, simulation.scheduler, "schedule", "plan")
    note(log, simulation.scheduler, "update", "commit")
    note(log, simulation.scheduler.requests[1].output, "text", "text")
    note(log, simulation.scheduler.requests[1], "count", "metrics")
    simulation.engine.observer = lambda record: log.append(("engine", "observe"))
    one_round = [("target", "begun"), ("draft", "begun"), ("target", "asked"), ("draft", "asked")]
    for _ in range(2):
        log.clear()
        assert simulation.engine.step()[0].token_ids
    plan, commit, *outputs = (("engine", w) for w in ("plan", "commit", "text", "metrics", "observe"))
    if overlaps:
        assert sorted(log[:2]) == sorted(one_round[2:])
        assert log[2:4] == [commit, plan]
        assert sorted(log[4:6]) == sorted(one_round[:2])
        assert log[6:] == outputs
    else:
        assert log == [plan, commit, *outputs]


def test_log_probabilities_are_made_while_the_next_round_runs() -> None:
    simulation = overlapping()
    simulation.add(request(1))
    verify, made = simulation.engine._verifier.verify, []

    def with_logprobs(*args: Any) -> VerifyResult:
        result = verify(*args)
        (decision,) = result.decisions.values()

        def logprobs() -> tuple[Any, ...]:
            made.append(in_flight(simulation))
            return tuple(decision.committed)

        return replace(result, decisions={1: decision._replace(logprobs=logprobs)})

    simulation.engine._verifier.verify = with_logprobs  # type: ignore[method-assign]
    for _ in range(3):
        (delta,) = simulation.engine.step()
        assert delta.logprobs == delta.token_ids
    assert made == [True] * 3


def test_a_drafter_that_keeps_this_thread_busy_is_not_begun_before_the_outputs_are_out() -> None:
    """The outputs would be late by a whole window. The first such round is one too late to know."""
    simulation = overlapping()
    waiting = True
    simulation.drafter.waits = lambda plan: waiting  # type: ignore[method-assign]
    simulation.add(request(1))
    for _ in range(2):
        assert simulation.step()
        assert not in_flight(simulation)
    waiting = False
    simulation.step()
    assert in_flight(simulation)


@pytest.mark.parametrize("method", ["pearl", "speculative", "whole-windows", "autoregressive", "two-halves"])
def test_outputs_and_counts_are_those_of_rounds_one_after_the_other(method: str) -> None:
    """With ends of every kind: the surplus round of a stop string is counted nowhere."""
    ends = [stopping(1, 9), replace(LONG, max_tokens=7), stopping(3, 4), replace(LONG, stop_token_ids=[11]), LONG]
    found = []
    for overlaps in (False, True):
        simulation = simulate(method, overlaps=overlaps, lanes=5, accuracy=0.8)
        requests = [request(i, params) for i, params in enumerate(ends, start=1)]
        simulation.add(*requests)
        simulation.run()
        for i, params in enumerate(ends, start=1):
            if params.stop_token_ids is None:
                assert (simulation.outputs[i], simulation.texts[i], simulation.last[i].finish_reason) == expected(
                    i, params
                )
        simulation.engine.rest()
        simulation.check_empty()
        metrics = [replace(r.metrics, arrival=0.0, first_token_at=None, finished_at=None) for r in requests]
        found.append((simulation.outputs, simulation.texts, metrics))
    assert found[0] == found[1]


def test_a_preemption_ends_a_run_behind_what_was_committed_before_it() -> None:
    """The next plan may preempt a request whose tokens are not counted yet."""
    found = []
    for overlaps in (False, True):
        simulation = simulate(overlaps=overlaps, num_pages=14, page_size=2, lanes=3, accuracy=1.0, lookahead=2)
        requests = [request_of(i, PROMPT, 14, eos_ids=()) for i in range(3)]
        simulation.add(*requests)
        simulation.run()
        assert any(r.metrics.preemptions and r.metrics.runs > 1 for r in requests)  # nothing else ends one of theirs
        found.append([(r.metrics.preemptions, r.metrics.runs, r.metrics.accepted, r.metrics.tested) for r in requests])
    assert found[0] == found[1]


# Ends while a round is in flight


@pytest.mark.parametrize("company", [False, True])
@pytest.mark.parametrize("token", [2, 3, 5, 8, 13])
def test_what_comes_behind_a_stop_string_is_never_shown(token: int, company: bool) -> None:
    params = stopping(1, token)
    simulation = overlapping()
    simulation.add(request(1, params), *([request(2)] if company else []))
    while 1 not in simulation.last or simulation.last[1].finish_reason is None:
        simulation.step()
    last = simulation.last[1]
    assert (simulation.outputs[1], simulation.texts[1], last.finish_reason) == expected(1, params)
    assert last.metrics.output_tokens == token + 1
    counted = replace(last.metrics)
    if company:
        assert in_flight(simulation)
        assert 1 in simulation.scheduler.planned  # the surplus
        simulation.step()
        assert 1 not in simulation.scheduler.planned
        simulation.run()
        assert simulation.outputs[2] == expected(2)[0]
    else:
        assert not simulation.engine.has_work
        simulation.engine.rest()
        assert simulation.engine.take() == []
    assert last.metrics == counted
    simulation.check_empty()


def test_a_stop_string_is_found_though_the_next_plan_preempted_its_request() -> None:
    """It waits then, and is not to run again."""
    simulation = overlapping(page_size=2)
    params = stopping(2, 6)
    simulation.add(request(1), request(2, params))
    schedule = simulation.scheduler.schedule

    def preempting() -> SchedulerOutput:
        victim = simulation.scheduler.requests.get(2)
        if victim in simulation.scheduler.running and victim.num_output > 6:
            simulation.scheduler._preempt(victim)
        return schedule()

    simulation.scheduler.schedule = preempting  # type: ignore[method-assign]
    simulation.run()
    assert (simulation.outputs[2], simulation.texts[2], simulation.last[2].finish_reason) == expected(2, params)
    assert simulation.outputs[1] == expected(1)[0]
    simulation.check_empty()


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_abort_frees_the_pages_at_once_and_drops_what_the_round_in_flight_finds(steps: int) -> None:
    simulation = overlapping()
    simulation.add(request(1), request(2))
    for _ in range(steps):
        simulation.step()
    before, shown = pages_held(simulation), list(simulation.outputs[1])
    assert in_flight(simulation)
    assert simulation.engine.abort(1).finish_reason == "abort"
    assert pages_held(simulation) < before
    simulation.check()
    simulation.add(request(3))  # wants the lane, and the pages
    simulation.run()
    assert simulation.outputs[1] == shown == expected(1)[0][: len(shown)]
    assert (simulation.outputs[2], simulation.outputs[3]) == (expected(2)[0], expected(3)[0])
    simulation.check_empty()


def test_a_request_of_the_same_id_is_not_taken_for_the_one_that_ended() -> None:
    simulation = overlapping(lanes=1)
    simulation.add(request(1))
    simulation.step()
    simulation.engine.abort(1)
    simulation.engine.take()
    simulation.last.clear()
    simulation.add(request(1))
    simulation.run()
    assert simulation.outputs[1] == expected(1)[0]
    simulation.check_empty()


def test_a_round_that_nobody_waits_for_is_dropped() -> None:
    """It is no observer's, and teaches no pace: nobody knows when it ended. Its pages are no other's until then."""
    simulation = overlapping()
    simulation.add(request(1))
    for _ in range(3):
        simulation.step()
    simulation.engine.abort(1)
    assert not simulation.engine.has_work
    assert in_flight(simulation)
    assert [d.finish_reason for d in simulation.engine.take()] == ["abort"]
    learned: list[object] = []
    simulation.engine._learn = learned.append  # type: ignore[method-assign]
    simulation.add(request(2))
    assert simulation.engine.step() == []  # collects it, and begins
    assert (len(simulation.records), learned) == (3, [])
    assert in_flight(simulation)
    simulation.run()
    assert simulation.outputs[2] == expected(2)[0]
    simulation.check_empty()


def test_nothing_is_begun_when_nobody_is_left() -> None:
    simulation = overlapping()
    for i in (1, 2):
        simulation.add(request(i))
        simulation.run()
    assert not any(record.plan.is_empty for record in simulation.records)
    assert simulation.outputs[2] == expected(2)[0]


def test_what_ends_by_length_or_an_id_is_not_planned_again() -> None:
    """No surplus: a stop string alone must be read first."""
    for params in (replace(LONG, max_tokens=6), replace(LONG, stop_token_ids=[expected(1)[0][5]])):
        simulation = overlapping()
        simulation.add(request(1, params), request(2))
        while 1 not in simulation.last or simulation.last[1].finish_reason is None:
            simulation.step()
        assert in_flight(simulation)
        assert set(simulation.scheduler.planned) == {2}


# Failures


def failing_once(owner: object, name: str, error: BaseException) -> None:
    call = getattr(owner, name)

    def raises(*args: Any) -> Any:
        setattr(owner, name, call)
        raise error

    setattr(owner, name, raises)


def parts(simulation: Simulation) -> dict[str, tuple[object, str]]:
    engine = simulation.engine
    return {
        "target": (engine._target_worker, "work"),
        "drafter": (engine._draft_worker, "work"),
        "verifier": (engine._verifier, "verify"),
        "check": (engine._target, "check"),
        "plan": (simulation.scheduler, "schedule"),
        "submit": (engine, "_submit"),
    }


@pytest.mark.parametrize("part", ["target", "drafter", "verifier", "check", "plan", "submit"])
def test_an_error_in_the_next_round_loses_no_output_of_the_last(part: str) -> None:
    """Tokens, then the error; wherever in the round it is raised."""
    simulation = overlapping(lanes=1)
    simulation.add(request(1), request(2))
    simulation.step()
    owner, name = parts(simulation)[part]
    failing_once(owner, name, RuntimeError("out of luck"))
    deltas: list[OutputDelta] = []
    while not deltas or deltas[-1].finish_reason is None:
        deltas += simulation.engine.step()
        simulation.check()
    simulation.outputs[1] += [token for delta in deltas if delta.request_id == 1 for token in delta.token_ids]
    assert [d.error for d in deltas if d.error] == ["RuntimeError: out of luck"]
    assert deltas[-1].request_id == 1
    assert simulation.outputs[1] == expected(1)[0][: len(simulation.outputs[1])]
    assert deltas[-1].metrics.output_tokens == len(simulation.outputs[1]) > 0
    if part in ("plan", "submit"):  # with the tokens of the round before in the same step
        assert [bool(delta.token_ids) for delta in deltas] == [True, False]
    simulation.run()
    assert simulation.outputs[2] == expected(2)[0]
    simulation.check_empty()


@pytest.mark.parametrize("part", ["target", "drafter", "verifier", "check"])
def test_an_error_of_a_round_that_nobody_waits_for_is_nobodys(part: str) -> None:
    simulation = overlapping()
    simulation.add(request(1), request(2, stopping(2, 4)))
    while 2 not in simulation.last or simulation.last[2].finish_reason is None:
        simulation.step()
    simulation.engine.abort(1)
    simulation.engine.take()
    owner, name = parts(simulation)[part]
    failing_once(owner, name, RuntimeError("out of luck"))
    simulation.add(request(3))
    simulation.run()  # asserts that no output has an error
    assert simulation.outputs[3] == expected(3)[0]
    simulation.check_empty()


def test_an_error_ends_those_that_are_left_of_a_round() -> None:
    simulation = overlapping()
    simulation.add(request(1, stopping(1, 4)), request(2))
    while 1 not in simulation.last or simulation.last[1].finish_reason is None:
        simulation.step()
    failing_once(simulation.engine._target_worker, "work", RuntimeError("out of luck"))
    assert [(d.request_id, d.error) for d in simulation.engine.step()] == [(2, "RuntimeError: out of luck")]
    simulation.check_empty()


@pytest.mark.parametrize("alone", [False, True])
def test_a_device_that_is_lost_in_flight_ends_the_engine(alone: bool) -> None:
    """Also when the round's own requests have ended: the others are answered."""
    simulation = overlapping(lanes=1)
    simulation.add(request(1), request(2))
    simulation.step()
    if alone:
        simulation.engine.abort(1)
        simulation.engine.take()
    failing_once(simulation.engine._target_worker, "work", RankError("rank 1 is gone"))
    ended = simulation.engine.step()
    assert {d.request_id: d.error for d in ended} == dict.fromkeys(
        [2] if alone else [1, 2], "RankError: rank 1 is gone"
    )
    with pytest.raises(EngineClosedError, match="rank 1 is gone"):
        simulation.engine.step()
    simulation.check_empty()
    simulation.engine.close()


def test_text_that_cannot_be_made_ends_its_request_and_drops_its_round_in_flight() -> None:
    simulation = overlapping()
    simulation.add(request(1), request(2), request(3, replace(LONG, max_tokens=1)))
    for i in (1, 3):  # the third has ended by its length when its text is made
        simulation.scheduler.requests[i].output.text = fail  # type: ignore[method-assign]
    ended = {d.request_id: d for d in simulation.engine.step()}
    for i in (1, 3):
        assert (ended[i].finish_reason, ended[i].error, ended[i].token_ids) == (
            "abort", "RuntimeError: out of luck", (),
        )  # fmt: skip
    simulation.outputs[2] += ended[2].token_ids
    assert in_flight(simulation)
    simulation.run()
    assert simulation.outputs[2] == expected(2)[0]
    simulation.check_empty()


def test_an_observer_that_raises_leaves_the_next_round_in_flight() -> None:
    simulation = overlapping()
    simulation.add(request(1))
    simulation.engine.observer = fail
    tokens: list[int] = []
    while simulation.engine.has_work:
        with pytest.raises(RuntimeError, match="out of luck"):
            simulation.engine.step()
        tokens += [token for delta in simulation.engine.take() for token in delta.token_ids]
    assert tokens == expected(1)[0]
    simulation.check_empty()


@pytest.mark.parametrize("part", ["target", "drafter", "verifier", "check", "plan", "submit"])
def test_an_interruption_loses_no_output_and_the_engine_goes_on(part: str) -> None:
    """Of both rounds that a step is about: the one that it collects, and the one that it begins."""
    simulation = overlapping()
    simulation.add(request(1))
    simulation.step()
    owner, name = parts(simulation)[part]
    failing_once(owner, name, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        simulation.engine.step()
    deltas = simulation.engine.take()
    assert [d.error for d in deltas if d.error] == ["KeyboardInterrupt"]
    tokens = simulation.outputs[1] + [token for delta in deltas for token in delta.token_ids]
    assert tokens == expected(1)[0][: len(tokens)]
    assert len(deltas) == (2 if part in ("plan", "submit") else 1)
    simulation.add(request(2))
    simulation.run()
    assert simulation.outputs[2] == expected(2)[0]
    simulation.check_empty()


@pytest.mark.parametrize("max_tokens", [1, 40])  # the output has ended with its first round, or goes on
def test_an_interruption_of_the_making_of_text_ends_the_engine_and_leaves_nobody_without_an_answer(
    max_tokens: int,
) -> None:
    log: Log = []
    simulation = overlapping(log)
    simulation.add(request(1, replace(LONG, max_tokens=max_tokens)))

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    simulation.scheduler.requests[1].output.text = interrupt  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        simulation.engine.step()
    assert simulation.engine.has_work
    assert simulation.engine.take() == []
    with pytest.raises(EngineClosedError, match="build a new one"):
        simulation.engine.step()
    simulation.engine.close()
    assert [(d.request_id, d.finish_reason) for d in simulation.engine.take()] == [(1, "abort")]
    assert [what for _, what in log[-2:]] == ["closed"] * 2  # LateWorker.close: at rest by then
    simulation.check_empty()


# Coming to rest


def test_rest_collects_what_is_in_flight_and_begins_nothing() -> None:
    simulation = overlapping()
    simulation.add(request(1))
    simulation.step()
    simulation.engine.rest()
    assert not any(worker.is_busy for worker in simulation.scheduler.workers)
    assert len(simulation.records) == 2
    (delta,) = simulation.engine.take()
    simulation.engine.rest()  # nothing more to do
    assert simulation.engine.take() == []
    simulation.outputs[1] += delta.token_ids
    simulation.run()
    assert simulation.outputs[1] == expected(1)[0]


@pytest.mark.parametrize("model", ["target", "draft"])
@pytest.mark.parametrize("wanted", [False, True])
def test_a_forward_is_measured_alone_when_the_round_in_flight_has_been_collected(model: str, wanted: bool) -> None:
    simulation = overlapping()
    simulation.add(request(1))
    simulation.step()
    plan = simulation.records[-1].plan
    if not wanted:
        simulation.engine.abort(1)
    if model == "target":
        simulation.engine.run_target(plan.target)
    else:
        simulation.engine.run_draft(DraftPlan(tuple(work._replace(num_draft=0) for work in plan.draft.work)))
    assert not any(worker.is_busy for worker in simulation.scheduler.workers)
    assert len(simulation.records) == 1 + wanted
    if wanted:
        simulation.outputs[1] += [token for delta in simulation.engine.take() for token in delta.token_ids]
        simulation.run()
        assert simulation.outputs[1] == expected(1)[0]


def test_close_waits_for_the_round_in_flight_though_it_fails() -> None:
    log: Log = []
    simulation = overlapping(log)
    simulation.add(request(1))
    simulation.step()
    done: list[str] = []

    def failing(call: Callable[[], Any]) -> Any:
        done.append("target")
        fail()

    simulation.scheduler.workers[0].work = failing  # type: ignore[method-assign]
    simulation.engine.close()  # LateWorker.close: at rest by then
    assert done == ["target"]
    assert log[-2:] == [("target", "closed"), ("draft", "closed")]
    assert [d.finish_reason for d in simulation.engine.take()] == ["abort"]
    simulation.engine.close()
    simulation.check_empty()


@pytest.mark.parametrize("use", ["round", "close"])
def test_another_engine_around_the_same_models_begins_when_the_first_is_at_rest(use: str) -> None:
    """Two variants share pages, and a thread each: what one has left in flight would write over the other's."""
    gate, log = Gate(), list[tuple[str, str]]()
    first, second = overlapping(log), overlapping(log)
    mine, other = Driver(first.engine, gate), Driver(second.engine, gate)
    readers = Reader(), Reader()
    mine.submit(readers[0], [request(1)])
    mine.round()
    mine.drop(readers[0], inside=True)
    assert in_flight(first)
    other.submit(readers[1], [request(2)])
    log.clear()
    getattr(other, use)()
    assert {what for _, what in log[:2]} == {"asked"}
    assert not any(worker.is_busy for worker in first.scheduler.workers)
    mine.submit(readers[0], [request(3)])
    mine.round()
    mine.round()
    assert in_flight(first)  # its own rounds are left in flight


@pytest.mark.parametrize("resume", ["step", "abort"])
@pytest.mark.parametrize("rounds", range(5))
def test_outputs_that_an_error_of_the_pace_held_up_come_in_order(rounds: int, resume: str) -> None:
    """A verdict is committed, and then something raises before it is made into outputs."""
    params = stopping(1, 5)
    simulation = overlapping()
    simulation.add(request(1, params), request(2))
    for _ in range(rounds):
        simulation.step()
    failing_once(simulation.engine, "_learn", ValueError("a pace is wrong"))
    with pytest.raises(ValueError, match="a pace"):
        simulation.engine.step()
    if resume == "abort":
        simulation.engine.abort(2)
        simulation.receive(simulation.engine.take())
    simulation.run()
    assert (simulation.outputs[1], simulation.texts[1], simulation.last[1].finish_reason) == expected(1, params)
    if resume == "abort":
        assert simulation.outputs[2] == expected(2)[0][: simulation.last[2].metrics.output_tokens]
        assert len(simulation.outputs[2]) > rounds
    else:
        assert simulation.outputs[2] == expected(2)[0]
    simulation.check_empty()


# What a round teaches


def test_what_is_prepared_for_the_next_round_is_not_charged_to_the_last() -> None:
    """Graphs are captured when a round is submitted: by then the last one is not shown to its observer yet."""
    simulation = overlapping()
    prepared = [0]
    simulation.engine._preparations = lambda: prepared[0]
    submit, news = simulation.engine._submit, iter([0, 2, 0, 3, 0])

    def capturing(*args: Any) -> Any:
        prepared[0] += next(news)
        return submit(*args)

    simulation.engine._submit = capturing  # type: ignore[method-assign]
    simulation.add(request(1))
    for _ in range(4):
        simulation.step()
    assert [record.preparations for record in simulation.records] == [0, 2, 0, 3]


class Clock:
    """time.perf_counter and monotonic, by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


@pytest.mark.parametrize(
    ("works", "text", "away", "seconds"),
    [
        (0.5, 0.0, 0.0, 0.5 + 0.25),  # the host waits for the models, then commits
        (0.5, 0.0, 0.3, 0.5 + 0.25),  # what the caller does meanwhile costs nothing
        (0.5, 0.0, 9.0, 0.5 + 0.25),  # nor what it does when the models have done their part
        (0.5, 0.4, 9.0, 0.5 + 0.25),  # nor outputs
        (0.5, 2.0, 9.0, 2.0 + 0.25),  # unless they take longer than the models
    ],
)
def test_the_time_of_a_round_is_not_that_of_its_caller(
    monkeypatch: pytest.MonkeyPatch, works: float, text: float, away: float, seconds: float
) -> None:
    clock, simulation = Clock(), overlapping()
    set_clock(monkeypatch, clock, simulation, works, text)
    simulation.add(request(1))
    for _ in range(4):
        simulation.step()
        clock.now += away
    assert [record.whole.seconds for record in simulation.records] == pytest.approx([works + 0.25] + [seconds] * 3)


def test_the_time_of_a_round_that_one_step_begins_and_collects_is_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before it left none in flight: another caller let that come to rest."""
    clock, simulation = Clock(), overlapping()
    set_clock(monkeypatch, clock, simulation, works=0.5, text=0.0)
    simulation.add(request(1))
    simulation.step()
    simulation.engine.rest()
    clock.now += 9.0
    simulation.drafter.waits = lambda plan: bool(advance(clock, 2.0))  # type: ignore[method-assign]
    simulation.step()
    assert simulation.records[-1].whole.seconds == pytest.approx(2.0 + 0.25)


def advance(clock: Clock, seconds: float) -> None:
    clock.now += seconds


def set_clock(monkeypatch: pytest.MonkeyPatch, clock: Clock, simulation: Simulation, works: float, text: float) -> None:
    """A target that works so long from its submission on, a verdict of a quarter of a second, and outputs."""
    monkeypatch.setattr("pearl.engine.engine.time", clock)
    engine = simulation.engine
    run, verify, submit, write = engine._target.run, engine._verifier.verify, engine._submit, engine._outbox.write
    begun: list[float] = []

    def submitted(*args: Any) -> Any:
        begun.append(clock.now)
        return submit(*args)

    def target(plan: Any) -> TargetOutput:
        clock.now = max(clock.now, begun[-1] + works)
        return replace(run(plan), busy=Busy(begun[-1], works))

    def verdict(*args: Any) -> VerifyResult:
        advance(clock, 0.25)
        return verify(*args)

    def written() -> None:
        advance(clock, text)
        write()

    engine._target.run, engine._verifier.verify = target, verdict  # type: ignore[method-assign]
    engine._submit, engine._outbox.write = submitted, written  # type: ignore[method-assign]

"""What a round is charged with, in time and in preparations, while the next one is made ready."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_sim import Simulation
from overlap_support import overlapping, request

from pearl.messages import Busy, TargetOutput, VerifyResult


def test_what_is_prepared_for_the_next_round_is_not_charged_to_the_last() -> None:
    """Graphs are captured when a round is submitted: by then the last one is not shown to its observer yet."""
    simulation = overlapping()
    prepared = [0]
    simulation.engine._preparations = lambda: prepared[0]
    submit, news = simulation.engine.workers.submit, iter([0, 2, 0, 3, 0])

    def capturing(*args: Any) -> Any:
        prepared[0] += next(news)
        return submit(*args)

    simulation.engine.workers.submit = capturing  # type: ignore[method-assign]
    simulation.add(request(1))
    for _ in range(4):
        simulation.step()
    assert [record.preparations for record in simulation.records] == [0, 2, 0, 3]


class Clock:
    """In the place of the module ``time``."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


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
    run, submit = engine.workers.target.run, engine.workers.submit
    verify, write = engine._verifier.verify, engine._outbox.write
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

    engine.workers.target.run, engine._verifier.verify = target, verdict  # type: ignore[method-assign]
    engine.workers.submit, engine._outbox.write = submitted, written  # type: ignore[method-assign]

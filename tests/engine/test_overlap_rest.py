"""Who waits until nothing is in flight any more: rest, lone forwards, close, and another engine of the same models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from engine_rig import fail
from overlap_support import Log, expected, in_flight, overlapping, request

from pearl.driver import Driver, Reader
from pearl.gate import Gate
from pearl.messages import DraftPlan


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

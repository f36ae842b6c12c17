"""What becomes of a round in flight when its requests end or are aborted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_sim import Simulation
from overlap_support import LONG, expected, in_flight, overlapping, request, stopping, until_ended

from pearl.messages import SchedulerOutput


def pages_held(simulation: Simulation) -> int:
    return sum(kv.num_pages - kv.num_free_pages for kv in simulation.pools)


@pytest.mark.parametrize("company", [False, True])
@pytest.mark.parametrize("token", [2, 3, 5, 8, 13])
def test_what_comes_behind_a_stop_string_is_never_shown(token: int, company: bool) -> None:
    params = stopping(1, token)
    simulation = overlapping()
    simulation.add(request(1, params), *([request(2)] if company else []))
    until_ended(simulation, 1)
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
        until_ended(simulation, 1)
        assert in_flight(simulation)
        assert set(simulation.scheduler.planned) == {2}

"""The scheduler when pages run out: who has to go, what that one loses, and that it comes back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from engine_requests import request_of
from engine_sim import Simulation, simulate
from method_paces import METHODS
from simulated_models import target_sequence
from test_scheduler import prompt

from pearl.engine.request import Request, Status


def crowded(method: str = "pearl", requests: Sequence[Request] = (), **options: int) -> Simulation:
    """Each request fits alone; together they do not."""
    simulation = simulate(method, **{"num_pages": 8, "page_size": 2, "lanes": 3, **options})
    simulation.add(*(requests or [request_of(i, prompt(4, i), 10, eos_ids=()) for i in (1, 2, 3)]))
    return simulation


@pytest.mark.parametrize("method", METHODS)
def test_the_preempted_request_completes_later_with_the_same_output(method: str) -> None:
    simulation = crowded(method)
    requests = dict(simulation.scheduler.requests)
    assert simulation.run() == {i: target_sequence(prompt(4, i), 10, eos_ids=()) for i in requests}
    assert sum(r.metrics.preemptions for r in requests.values()) > 0
    simulation.check_empty()


def test_the_latest_arrival_is_preempted_and_the_first_never() -> None:
    simulation = crowded()
    first = simulation.scheduler.requests[1]
    order: list[int] = []
    while simulation.engine.has_work:
        running = [r.id for r in simulation.scheduler.running]
        plan = simulation.step()
        if plan.preempted and running:
            order += plan.preempted
    assert first.metrics.preemptions == 0
    assert set(order) == {2, 3}


def test_a_preempted_request_loses_pages_lane_and_pending_and_waits_in_front() -> None:
    simulation = crowded(accuracy=1.0)  # type: ignore[arg-type]
    late = request_of(4, prompt(4, 4), 10)
    simulation.add(late)
    while not (plan := simulation.step()).preempted:
        pass
    for request_id in plan.preempted:
        victim = simulation.scheduler.requests[request_id]
        assert (victim.status, victim.lane, victim.pending) == (Status.WAITING, -1, ())
        assert (victim.target_computed, victim.draft_computed) == (0, 0)
    waiting = [r.id for r in simulation.scheduler.waiting]
    assert waiting == sorted(waiting)
    assert waiting[-1] == 4


def test_a_request_may_preempt_itself_and_come_back() -> None:
    """The later one of two finds no page: nobody is behind it, so it has to go itself."""
    simulation = crowded(requests=[request_of(i, prompt(6, i), 8, eos_ids=()) for i in (1, 2)], num_pages=7)
    while simulation.engine.has_work:
        plan = simulation.step()
        assert 1 not in plan.preempted
    assert len(simulation.outputs[2]) == 8
    simulation.check_empty()


def test_nobody_is_admitted_into_a_pool_without_room_for_its_prompt() -> None:
    simulation = simulate("pearl", num_pages=8, page_size=2, lanes=3, prefix_caching=False)
    simulation.add(request_of(1, prompt(10), 6, eos_ids=()))
    simulation.step()
    simulation.add(request_of(2, prompt(8, 2), 4, eos_ids=()))
    while 1 in simulation.scheduler.requests:
        assert simulation.scheduler.requests[2].status is Status.WAITING
        simulation.step()
    assert len(simulation.run()[2]) == 4
    simulation.check_empty()

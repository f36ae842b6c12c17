"""Pages of prepared windows: who holds what, and what the prefix cache finds, after every round of simulated models."""

from __future__ import annotations

import pytest
from engine_requests import request_of
from engine_sim import simulate
from simulated_models import target_sequence

PROMPTS = [[1, 2, 3], [1, 2, 3, 4, 5], [7]]


@pytest.mark.parametrize("branch_seed", [None, 0, 1])
@pytest.mark.parametrize("page_size", [1, 2, 4])
@pytest.mark.parametrize("method", ["pearl", "whole-windows", "pre-verify-only", "switching"])
def test_pages_hold_and_the_cache_finds_committed_text_alone(
    method: str, page_size: int, branch_seed: int | None
) -> None:
    """``Simulation.check`` after each round, ``PagedMemory`` at each read."""
    simulation = simulate(method, window=5, page_size=page_size, branches=6, branch_seed=branch_seed, accuracy=0.6)
    for first in (0, 10):  # the second time from cached pages
        requests = [request_of(first + i, prompt, 24, eos_ids=()) for i, prompt in enumerate(PROMPTS)]
        simulation.add(*requests)
        outputs = simulation.run()
        assert [outputs[first + i] for i in range(3)] == [target_sequence(prompt, 24, ()) for prompt in PROMPTS]
        simulation.check_empty()
    assert simulation.scheduler.branches is not None
    assert sum(simulation.scheduler.branches.counts.hits.values()) > 0
    assert all(request.metrics.cached_tokens >= 2 for request in requests[:2] if page_size == 1)


def test_branches_take_only_pages_that_nobody_else_needs() -> None:
    """One request's last pages: its branches find none, and it is not preempted."""
    simulation = simulate("pearl", window=4, page_size=2, num_pages=7, branches=4, accuracy=0.6, lanes=1)
    request = request_of(0, [1, 2], 12, eos_ids=())
    simulation.add(request)
    assert simulation.run() == {0: target_sequence([1, 2], 12, ())}
    assert request.metrics.preemptions == 0
    assert 0 < request.metrics.prepared < 4 * len(simulation.records)
    simulation.check_empty()

"""Requests with one beginning, come together: it is computed once, by the oldest of those that are still there."""

from __future__ import annotations

import pytest
from engine_requests import request_of
from engine_sim import Simulation, simulate
from simulated_models import target_sequence

from pearl.engine.prompt_logprobs import PromptProgress
from pearl.engine.request import Request
from pearl.sampling_params import SamplingParams

PROMPT = [(5 * i * i + i) % 29 for i in range(21)]


def arrivals(count: int, prompt: list[int] = PROMPT, draft: bool = True) -> list[Request]:
    params = SamplingParams(max_tokens=6, draft=draft)
    return [request_of(1 + i, prompt, 6, params=params, eos_ids=()) for i in range(count)]


def computed(simulation: Simulation) -> dict[str, list[int]]:
    """How often each position of the prompt is computed, by model, until all outputs have ended."""
    counts = {"target": [0] * len(PROMPT), "draft": [0] * len(PROMPT)}
    while simulation.engine.has_work:
        plan = simulation.step()
        for model, items in (("target", plan.target.work), ("draft", [w.forward for w in plan.draft.work])):
            for item in items:
                for position in range(item.start, min(item.end, len(PROMPT))):
                    counts[model][position] += 1
    return counts


def run_out(simulation: Simulation, *ids: int) -> None:
    expected = target_sequence(PROMPT, 6, eos_ids=())
    assert {i: simulation.run()[i] for i in ids} == dict.fromkeys(ids, expected)


@pytest.mark.parametrize("budget", [64, 7])
@pytest.mark.parametrize("method", ["pearl", "speculative", "autoregressive"])
def test_a_prompt_is_computed_once(method: str, budget: int) -> None:
    simulation = simulate(method, budget=budget, page_size=4)
    requests = arrivals(3)
    simulation.add(*requests)
    counts = computed(simulation)
    for model in ("target",) if method == "autoregressive" else ("target", "draft"):
        assert counts[model] == [1] * 20 + [3]  # five full pages; the position behind them is everybody's own
    assert [request.metrics.cached_tokens for request in requests] == [0, 20, 20]
    run_out(simulation, 1, 2, 3)


def test_without_a_prefix_cache_everybody_computes() -> None:
    simulation = simulate(page_size=4, prefix_caching=False)
    simulation.add(*arrivals(3))
    assert computed(simulation)["target"] == [3] * 21


def test_nobody_waits_for_what_is_not_alike() -> None:
    """Two pages are the same; of the third, everybody needs his own."""
    simulation = simulate(page_size=4)
    simulation.add(*arrivals(2))
    simulation.add(request_of(3, [*PROMPT[:8], 1, *PROMPT[9:]], 6, eos_ids=()))
    first, second = simulation.step(), simulation.step()
    assert [work.state.request_id for work in first.target.work] == [1]
    assert {work.state.request_id: work.start for work in second.target.work} == {1: 21, 2: 20, 3: 8}


def test_another_goes_on_where_the_first_one_left() -> None:
    simulation = simulate(budget=8, page_size=4)
    simulation.add(*arrivals(3))
    simulation.step()
    simulation.engine.abort(1)
    plan = simulation.step()
    assert [(work.state.request_id, work.start) for work in plan.target.work] == [(2, 8)]
    run_out(simulation, 2, 3)


def test_a_request_that_is_not_drafted_for_computes_nothing_for_the_draft() -> None:
    """The oldest has its prompt's KV in the target's cache alone: of the draft's, the next one is the oldest."""
    simulation = simulate(page_size=4)
    simulation.add(arrivals(1, draft=False)[0], *arrivals(3)[1:])
    counts = computed(simulation)
    assert counts == {"target": [1] * 20 + [3], "draft": [1] * 20 + [2]}
    run_out(simulation, 1, 2, 3)


@pytest.mark.parametrize(("wants", "compute"), [(1, {1}), (2, {1, 2})])
def test_rows_that_are_wanted_are_computed_and_shared(wants: int, compute: set[int]) -> None:
    """Log-probabilities of a prompt want each of its rows: it waits for nobody, but others for it."""
    simulation = simulate("autoregressive", budget=15, page_size=4)
    requests = [arrivals(1)[0], arrivals(2, PROMPT[:9])[1]]
    requests[wants - 1].prompt_logprobs = PromptProgress(requests[wants - 1].tokens, 0)
    simulation.add(*requests)
    assert {work.state.request_id for work in simulation.scheduler.schedule().target.work} == compute

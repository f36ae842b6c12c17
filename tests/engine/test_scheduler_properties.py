"""Whatever arrives, in whatever engine: every output is the target's own sequence, and nothing is left behind.

CheckedScheduler checks every plan, PagedMemory every read of either model, Simulation.step both pools each round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine_requests import request_of
from engine_sim import Simulation, simulate
from hypothesis import event, given, settings
from hypothesis import strategies as st
from method_paces import METHODS
from simulated_models import expected_output

from pearl.engine.request import Status
from pearl.sampling_params import SamplingParams

# One text that prompts are cut from, so that they share prefixes and pages.
TEXT = [(7 * i * i + 3 * i) % 29 for i in range(24)]

DRAFTING = [name for name in METHODS if name not in ("autoregressive", "switching")]


@dataclass(frozen=True)
class Arrival:
    round: int
    prompt: list[int]
    max_tokens: int
    abort_round: int | None
    stop: str | None
    draft: bool = True

    @property
    def params(self) -> SamplingParams:
        return SamplingParams(max_tokens=self.max_tokens, stop=self.stop, draft=self.draft, token_sources=True)

    @property
    def positions(self) -> int:
        return len(self.prompt) + self.max_tokens


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    begin = draw(st.sampled_from([0, 0, 0, 8]))
    prompt = TEXT[begin : begin + draw(st.integers(1, 16))] + draw(st.lists(st.integers(1, 28), max_size=2))
    at = draw(st.integers(0, 12))
    abort = draw(st.one_of(st.none(), st.none(), st.integers(at, at + 15)))
    stop = draw(st.sampled_from([None, None, "<3>", "4><1", "2>", "><1"]))
    return Arrival(at, prompt, draw(st.integers(1, 14)), abort, stop, draw(st.sampled_from([True, True, False])))


@st.composite
def engines(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "method": draw(st.sampled_from(list(METHODS))),
        "window": draw(st.integers(1, 6)),
        "page_size": draw(st.sampled_from([1, 2, 3, 4, 8])),
        "budget": draw(st.integers(1, 20)),
        "prefill_chunk": draw(st.sampled_from([None, 1, 3, 8])),
        "lanes": draw(st.integers(1, 4)),
        "draft_keeps_kv": draw(st.sampled_from([True, True, True, False])),
        "accuracy": draw(st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0])),
        "moody": draw(st.booleans()),
        "prefix_caching": draw(st.booleans()),
        "lookahead": draw(st.sampled_from([64, 64, 2])),
        "branches": draw(st.sampled_from([0, 1, 3, 7])),
        "branch_seed": draw(st.sampled_from([None, 0, 1])),
        "overlaps": draw(st.booleans()),
    }


def play(simulation: Simulation, plan: list[Arrival], bound: int) -> set[int]:
    """Deliver arrivals and aborts round by round until everything has ended; returns the ids that were aborted."""
    aborted: set[int] = set()
    last = max(arrival.round for arrival in plan)
    for turn in range(bound):
        for request_id, arrival in enumerate(plan):
            if arrival.round == turn:
                simulation.add(request_of(request_id, arrival.prompt, arrival.max_tokens, params=arrival.params))
            if arrival.abort_round == turn and request_id in simulation.scheduler.requests:
                simulation.engine.abort(request_id)
                simulation.check()
                aborted.add(request_id)
        if turn >= last and not simulation.engine.has_work:
            return aborted
        simulation.step()
    raise AssertionError(f"not finished after {bound} rounds")


@settings(max_examples=250)
@given(st.lists(arrivals(), min_size=1, max_size=7), engines(), st.integers(0, 6))
def test_every_request_ends_with_exactly_the_targets_sequence(
    plan: list[Arrival], options: dict[str, Any], spare_pages: int
) -> None:
    size = options["page_size"]
    num_pages = max(-(-arrival.positions // size) for arrival in plan) + spare_pages
    simulation = simulate(num_pages=num_pages, **options)
    # Even one request after another, one position a round, with every round lost to a preemption, would be faster.
    bound = 50 + 4 * sum(arrival.positions for arrival in plan)
    aborted = play(simulation, plan, bound)
    for request_id, arrival in enumerate(plan):
        wanted, text, reason = expected_output(arrival.prompt, arrival.max_tokens, arrival.params)
        output = simulation.outputs[request_id]
        if request_id in aborted:
            assert output == wanted[: len(output)]  # nothing unverified was ever given out
            assert text.startswith(simulation.texts[request_id])
        else:
            assert (output, simulation.texts[request_id]) == (wanted, text)
            last = simulation.last[request_id]
            assert last.finish_reason == reason
            assert last.metrics.output_tokens == len(wanted)
            assert last.metrics.accepted <= last.metrics.tested <= last.metrics.drafted
            assert arrival.draft or last.metrics.drafted == last.metrics.draft_forwards == 0
            assert last.metrics.accepted == 0 or last.metrics.runs > 0
            event(f"preempted: {last.metrics.preemptions > 0}, cached: {last.metrics.cached_tokens > 0}")
    simulation.check_empty()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 30), st.sampled_from(DRAFTING))
def test_a_perfect_draft_needs_the_fewest_rounds(window: int, page_size: int, max_tokens: int, method: str) -> None:
    """With every token accepted, each method's number of target forwards is known exactly."""
    simulation = simulate(method, window=window, page_size=page_size, accuracy=1.0, num_pages=64)
    request = request_of(0, TEXT[:5], max_tokens, eos_ids=())
    simulation.add(request)
    simulation.run()
    first, each = {
        "pearl": (1, window),
        "whole-windows": (window + 1, window if window > 1 else 2),
        "pre-verify-only": (1, window),
        "two-halves": (window + 1, window + 1),
        "speculative": (window + 1, window + 1),
    }[method]
    committed, forwards = 0, 0
    while committed < max_tokens:
        forwards += 1
        if method == "pre-verify-only":  # a first token, then the rest of its window and a bonus token
            committed += 1 if forwards % 2 or window == 1 else window
        else:
            committed += first if forwards == 1 else each
    assert request.metrics.target_forwards == forwards


@given(st.lists(arrivals(), min_size=2, max_size=5), engines())
def test_outputs_do_not_depend_on_the_order_of_arrival_or_the_company(
    plan: list[Arrival], options: dict[str, Any]
) -> None:
    def outputs(order: list[int]) -> dict[int, list[int]]:
        simulation = simulate(num_pages=60, **options)
        simulation.add(*(request_of(i, plan[i].prompt, plan[i].max_tokens) for i in order))
        return simulation.run()

    together = outputs(list(range(len(plan))))
    assert outputs(list(reversed(range(len(plan))))) == together
    assert outputs([0]) == {0: together[0]}


@given(st.lists(arrivals(), min_size=2, max_size=6), engines(), st.integers(0, 3))
def test_the_oldest_running_request_is_never_preempted(
    plan: list[Arrival], options: dict[str, Any], spare_pages: int
) -> None:
    """So some request always goes on: no two can preempt each other for ever."""
    size = options["page_size"]
    num_pages = max(-(-arrival.positions // size) for arrival in plan) + spare_pages
    simulation = simulate(num_pages=num_pages, **options)
    simulation.add(*(request_of(i, arrival.prompt, arrival.max_tokens) for i, arrival in enumerate(plan)))
    for _ in range(1000):
        if not simulation.engine.has_work:
            return
        simulation.scheduler._admit()
        oldest = simulation.scheduler.running[0]
        ids = [request.id for request in (*simulation.scheduler.running, *simulation.scheduler.waiting)]
        assert ids == sorted(ids)
        simulation.step()
        assert oldest.status is not Status.WAITING
    raise AssertionError("not finished after 1000 rounds")


@given(st.lists(arrivals(), min_size=1, max_size=6), engines(), st.integers(0, 3))
def test_requests_that_have_caught_up_are_planned_as_if_they_might_lag(
    plan: list[Arrival], options: dict[str, Any], spare_pages: int
) -> None:
    """The budget is worked out for the requests that lag only; asking it about all changes no plan."""
    size = options["page_size"]
    num_pages = max(-(-arrival.positions // size) for arrival in plan) + spare_pages
    short, general = (simulate(num_pages=num_pages, **options) for _ in range(2))
    general.scheduler._lags = lambda *_: True  # type: ignore[method-assign]
    for simulation in (short, general):
        play(simulation, plan, bound=2000)
    assert [record.plan for record in short.records] == [record.plan for record in general.records]

"""What is made while the next round is in flight, and that outputs and counts do not know of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_requests import request_of
from engine_sim import simulate
from overlap_support import LONG, PROMPT, Log, expected, in_flight, overlapping, request, stopping

from pearl.messages import VerifyResult


def note(log: Log, owner: object, name: str, what: str) -> None:
    """Write down when a method is called."""
    call = getattr(owner, name)

    def noted(*args: Any) -> Any:
        log.append(("engine", what))
        return call(*args)

    setattr(owner, name, noted)


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

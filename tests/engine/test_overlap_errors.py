"""Errors and interruptions with a round in flight: what was found before them is not lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from engine_rig import fail, raising
from engine_sim import Simulation
from overlap_support import LONG, Log, expected, in_flight, overlapping, request, stopping, until_ended

from pearl.errors import EngineClosedError, RankError
from pearl.outputs import OutputDelta


def failing_once(owner: object, name: str, error: BaseException) -> None:
    call = getattr(owner, name)

    def raises(*args: Any) -> Any:
        setattr(owner, name, call)
        raise error

    setattr(owner, name, raises)


def parts(simulation: Simulation) -> dict[str, tuple[object, str]]:
    engine = simulation.engine
    return {
        "target": (engine.workers.target_worker, "work"),
        "drafter": (engine.workers.draft_worker, "work"),
        "verifier": (engine._verifier, "verify"),
        "check": (engine.workers.target, "check"),
        "plan": (simulation.scheduler, "schedule"),
        "submit": (engine.workers, "submit"),
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
    until_ended(simulation, 2)
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
    until_ended(simulation, 1)
    failing_once(simulation.engine.workers.target_worker, "work", RuntimeError("out of luck"))
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
    failing_once(simulation.engine.workers.target_worker, "work", RankError("rank 1 is gone"))
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
    simulation.scheduler.requests[1].output.text = raising(KeyboardInterrupt())  # type: ignore[method-assign]
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

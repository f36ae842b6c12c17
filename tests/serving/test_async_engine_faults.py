"""What fails under an AsyncEngine: whoever waits for it is told, and nobody else loses a token."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from async_support import (
    Hook,
    assert_drains_empty,
    assert_nothing_held,
    bundled,
    errors_of,
    greedy,
    held,
    hooked_llm,
    read,
    run,
    serving,
    thread_of,
    until,
)

from pearl import EngineClosedError
from pearl.engine.rounds import RoundRecord
from pearl.errors import CaptureError
from pearl.messages import TargetOutput, TargetPlan
from pearl.serving.async_engine import AsyncEngine
from pearl.serving.health import Health

PROMPT = [5, 6, 7]


def raising(error: BaseException) -> Callable[..., Any]:
    def call(*args: object) -> None:
        raise error

    return call


def test_a_round_that_fails_ends_its_requests_and_no_others() -> None:
    llm, hooked = hooked_llm(max_num_seqs=2)

    async def test() -> None:
        async with serving(llm) as engine:
            expected = await read(engine.submit(PROMPT, greedy(20)))
            streams = [engine.submit(PROMPT, greedy(300)) for _ in range(2)]
            for stream in streams:
                await anext(stream)
            waiting = engine.submit(PROMPT, greedy(20))
            hooked.before = fail_once(hooked, RuntimeError("out of luck"))
            for stream in streams:
                assert (await errors_of(stream))[-1] == "RuntimeError: out of luck"
            assert (await read(waiting))[0].token_ids == expected[0].token_ids
            assert engine.health == Health(True)
            await assert_drains_empty(engine)

    run(test())


def fail_once(hooked: Hook, error: BaseException) -> Callable[[TargetPlan], None]:
    def before(plan: TargetPlan) -> None:
        hooked.before = lambda plan: None
        raise error

    return before


def test_a_request_without_numbers_fails_alone() -> None:
    llm, hooked = hooked_llm(max_num_seqs=3, method="autoregressive")

    def poison(plan: TargetPlan, output: TargetOutput) -> None:
        row = 0
        for work in plan.work:
            if work.state.prompt_length == 4 and work.end > 10:
                assert output.logits is not None
                output.logits[row : row + work.num_logits] = torch.nan
            row += work.num_logits

    async def test() -> None:
        async with serving(llm) as engine:
            expected = await read(engine.submit(PROMPT, greedy(30)))
            hooked.after = poison
            streams = [engine.submit([*PROMPT, 8][:n], greedy(30)) for n in (3, 4, 3)]
            good, (bad,), same = await asyncio.gather(*map(read, streams))
            assert bad.finish_reason == "abort"
            assert bad.error is not None
            assert 0 < len(bad.token_ids) < 10
            assert good[0].token_ids == same[0].token_ids == expected[0].token_ids
            assert engine.health == Health(True)
            await assert_drains_empty(engine)

    run(test())


def broken_driver(engine: AsyncEngine) -> None:
    engine.llm.driver.round = raising(KeyError("a request"))  # type: ignore[method-assign]


def broken_plan(engine: AsyncEngine) -> None:
    engine.llm.engine.scheduler.schedule = raising(SystemExit("enough"))  # type: ignore[method-assign]


def broken_learning(engine: AsyncEngine) -> None:
    """Behind the commit of a round."""
    engine.llm.engine._learn = raising(ZeroDivisionError("no time"))  # type: ignore[method-assign]


def broken_device(engine: AsyncEngine) -> None:
    engine.llm.engine.workers.target.run = raising(CaptureError("no graph"))  # type: ignore[method-assign]


def closed_worker(engine: AsyncEngine) -> None:
    worker = engine.llm.engine.workers.draft_worker
    assert worker is not None
    worker.close()


def ended_worker(engine: AsyncEngine) -> None:
    """As by a library that ends threads."""
    engine.llm.engine.workers.drafter.propose = raising(SystemExit("enough"))  # type: ignore[method-assign, union-attr]


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (broken_driver, "KeyError: 'a request'"),
        (broken_plan, "SystemExit: enough"),
        (broken_learning, "ZeroDivisionError: no time"),
        (broken_device, "CaptureError: no graph"),
        (closed_worker, "EngineClosedError: the worker"),
        (ended_worker, "SystemExit: enough"),
    ],
)
def test_an_engine_that_cannot_go_on_answers_everyone_and_turns_red(
    break_it: Callable[[AsyncEngine], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Who runs, who waits, who has just come, and who comes later. Then it can still be closed."""
    llm, hooked = hooked_llm(max_num_seqs=2, window=3)

    async def test() -> threading.Thread:
        engine = AsyncEngine(llm)
        streams = [engine.submit(PROMPT, greedy(300, n=2)), engine.submit(PROMPT, greedy(300))]
        await anext(streams[0])
        with held(hooked) as hold:
            await hold.until_reached()
            break_it(engine)
            streams.append(engine.submit(PROMPT, greedy(300)))
        for stream, outputs in zip(streams, (2, 1, 1), strict=True):
            for output in await read(stream, outputs):
                assert output.finish_reason == "abort"
                assert output.error is not None
                assert reason in output.error
                assert output.metrics.finished_at is not None
        await until(lambda: not engine.health.ok)
        assert reason in str(engine.health.reason)
        with pytest.raises(EngineClosedError, match=reason.split(":")[0]):
            engine.submit(PROMPT, greedy())
        assert (engine.load.running, engine.load.waiting) == (0, 0)
        await engine.drain()
        await engine.close()
        assert reason in str(engine.health.reason)
        return thread_of(engine)

    with caplog.at_level(logging.CRITICAL):
        assert not run(test()).is_alive()
    assert [record.levelname for record in caplog.records] == ["CRITICAL"]


def test_what_comes_as_it_dies_is_answered_too() -> None:
    """The thread has failed already, and the client has not heard of it."""
    llm = bundled()

    async def test() -> None:
        engine = AsyncEngine(llm)
        broken_driver(engine)
        first = engine.submit(PROMPT, greedy())
        while engine._thread.failure is None:  # without a turn of the loop: no answer has arrived
            pass
        engine._thread.failure, reason = None, engine._thread.failure
        second = engine.submit(PROMPT, greedy(n=2))
        engine._thread.failure = reason
        assert await errors_of(first) == ["KeyError: 'a request'"]
        assert len(await errors_of(second)) == 2
        await engine.close()

    run(test())


def test_a_round_that_does_not_end_turns_health_red_until_it_does() -> None:
    llm, hooked = hooked_llm()

    async def test() -> None:
        async with serving(llm, round_limit=0.2) as engine:
            assert engine.health == Health(True)
            with held(hooked) as hold:
                stream = engine.submit(PROMPT, greedy(8))
                await hold.until_reached()
                await until(lambda: not engine.health.ok)
                assert "the limit is 0.2 s" in str(engine.health.reason)
                engine.submit(PROMPT, greedy(8)).cancel()
            (output,) = await read(stream)
            assert len(output.token_ids) == 8
            await engine.drain()
            await asyncio.sleep(0.25)  # longer than a round may last
            assert engine.health == Health(True)

    run(test())


def test_closing_does_not_wait_for_ever_for_a_round_that_does_not_end(caplog: pytest.LogCaptureFixture) -> None:
    llm, hooked = hooked_llm()

    async def test() -> None:
        engine = AsyncEngine(llm, round_limit=0.05)
        with held(hooked) as hold:
            stream = engine.submit(PROMPT, greedy(8))
            await hold.until_reached()
            behind = engine.submit(PROMPT, greedy(8, n=2))
            await engine.close()
            assert "left behind" in caplog.text
            for told, outputs in ((stream, 1), (behind, 2)):
                assert await errors_of(told) == ["the engine was closed in a round that does not end"] * outputs
        await asyncio.to_thread(thread_of(engine).join)
        assert_nothing_held(llm)

    run(test())


def test_observers_that_raise_harm_nobody(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[RoundRecord] = []
    llm = bundled(observer=raising(ValueError("asleep")))
    (expected,) = bundled().generate([PROMPT], greedy(30))

    async def test() -> None:
        async with serving(llm) as engine:
            engine.observe(raising(TypeError("awake")))
            engine.observe(seen.append)
            (output,) = await read(engine.submit(PROMPT, greedy(30)))
            assert output.token_ids == expected.outputs[0].token_ids
            await engine.drain()
            assert len(seen) == llm.engine.stats.rounds > 2
            assert engine.health == Health(True)

    run(test())
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ValueError, TypeError]

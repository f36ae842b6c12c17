"""What an engine takes, and what it refuses: a full queue, wrong requests, draining, the end."""

from __future__ import annotations

import asyncio

import pytest
from async_support import (
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
    until,
)

from pearl import EngineClosedError, EngineDrainingError, InvalidRequestError, QueueFullError, SamplingParams
from pearl.serving.async_engine import AsyncEngine
from pearl.serving.health import EngineLoad, Health


def test_the_queue_is_bounded_and_takes_all_outputs_of_a_prompt_or_none() -> None:
    llm, hooked = hooked_llm(max_num_seqs=1, max_waiting=3)

    async def test() -> None:
        async with serving(llm) as engine:
            with held(hooked) as hold:
                streams = [engine.submit([5, 6, 7], greedy(4)) for _ in range(2)]
                await hold.until_reached()
                with pytest.raises(QueueFullError, match="room for 2: 0 lanes are free, and 3 may wait"):
                    engine.submit([5, 6, 7], greedy(4, n=3))
                streams.append(engine.submit([5, 6, 7], greedy(4, n=2)))
                with pytest.raises(QueueFullError, match="3 requests are waiting, the limit"):
                    engine.submit([5, 6, 7], greedy(4))
                assert engine.load.running + engine.load.waiting == 4
                streams[1].cancel()
            await until(lambda: engine.load.running + engine.load.waiting < 4)
            streams[1] = engine.submit([5, 6, 7], greedy(4))
            outputs = await asyncio.gather(read(streams[0]), read(streams[1]), read(streams[2], 2))
            assert [len(o.token_ids) for several in outputs for o in several] == [4] * 4
            await assert_drains_empty(engine)

    run(test())


def test_load_tells_what_runs_and_waits() -> None:
    llm, hooked = hooked_llm(max_num_seqs=2)

    async def test() -> None:
        async with serving(llm) as engine:
            assert engine.load == EngineLoad(0, 0, 0.0)
            streams = [engine.submit([5, 6, 7], greedy(40)) for _ in range(3)]
            await anext(streams[0])
            with held(hooked) as hold:
                await hold.until_reached()
                assert (engine.load.running, engine.load.waiting) == (2, 1)
                assert 0 < engine.load.kv_usage < 1
                streams.append(engine.submit([5, 6, 7], greedy(40)))
                assert (engine.load.running, engine.load.waiting) == (2, 2)
            await asyncio.gather(*map(read, streams))

    run(test())


def test_what_cannot_be_is_refused_at_once_and_costs_nobody_anything() -> None:
    llm = bundled(max_num_seqs=2)

    async def test() -> None:
        async with serving(llm) as engine:
            stream = engine.submit([5, 6, 7], greedy(30))
            for prompt, params in (
                ([], greedy()),
                ([10**9], greedy()),
                ([5] * 512, greedy()),
                ([5], SamplingParams(logit_bias={10**6: 1.0})),
                ([5], {"max_tokens": 3}),
            ):
                with pytest.raises(InvalidRequestError):
                    engine.submit(prompt, params)  # type: ignore[arg-type]
            (output,) = await read(stream)
            assert len(output.token_ids) == 30
            await engine.drain()
            assert engine.load == EngineLoad(0, 0, 0.0)

    run(test())


def test_draining_ends_what_runs_and_takes_nothing_new() -> None:
    llm = bundled(max_num_seqs=1)

    async def test() -> None:
        async with serving(llm) as engine:
            streams = [engine.submit([5, 6, 7], greedy(30)) for _ in range(3)]
            drained = asyncio.create_task(engine.drain())
            await asyncio.sleep(0)
            with pytest.raises(EngineDrainingError):
                engine.submit([5], greedy())
            assert not drained.done()
            assert engine.draining
            await drained
            assert_nothing_held(llm)
            for stream in streams:  # what nobody had read is still there
                (output,) = await read(stream)
                assert len(output.token_ids) == 30
            assert engine.health == Health(True)
            await engine.drain()

    run(test())


def test_draining_waits_no_longer_than_it_may_and_closing_ends_the_rest() -> None:
    llm, hooked = hooked_llm()

    async def test() -> None:
        engine = AsyncEngine(llm)
        with held(hooked) as hold:
            stream = engine.submit([5, 6, 7], greedy(30))
            await hold.until_reached()
            await engine.drain(0.01)
            closing = asyncio.create_task(engine.close())
            await asyncio.sleep(0)
            with pytest.raises(EngineClosedError):
                engine.submit([5], greedy())
        await asyncio.gather(closing, engine.close(), engine.drain())
        assert (await errors_of(stream))[-1] == "the engine was closed before this output had ended"
        assert engine.health == Health(False, "the engine is closed; build a new one")
        with pytest.raises(EngineClosedError):
            llm.generate("x", greedy())
        await engine.drain()

    run(test())

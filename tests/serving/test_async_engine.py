"""Many clients of one engine: each gets its own output, whatever the others do."""

from __future__ import annotations

import asyncio
import gc
import random
from typing import Any

import pytest
from async_support import (
    PROMPTS,
    Hold,
    assert_nothing_held,
    bundled,
    errors_of,
    greedy,
    held,
    hook,
    read,
    run,
    serving,
    until,
)

from pearl import (
    ConfigurationError,
    EngineClosedError,
    EngineDrainingError,
    EngineInUseError,
    InvalidRequestError,
    QueueFullError,
    SamplingParams,
)
from pearl.messages import TargetPlan
from pearl.serving.async_engine import AsyncEngine
from pearl.serving.async_stream import AsyncStream
from pearl.serving.health import EngineLoad, Health


def mixed_params(index: int) -> SamplingParams:
    kinds: tuple[dict[str, Any], ...] = (
        {"max_tokens": 40},
        {"max_tokens": 33, "temperature": 1.0, "seed": index},
        {"max_tokens": 30, "temperature": 0.8, "top_p": 0.9, "seed": index, "n": 2},
        {"max_tokens": 60, "stop": ["\n\n", "return"]},
        {"max_tokens": 25, "temperature": 1.0, "seed": index, "logprobs": 2},
    )
    return SamplingParams(**kinds[index % len(kinds)])


@pytest.mark.parametrize("options", [{}, {"verification": "coupled", "window": 3}, {"method": "autoregressive"}])
def test_many_clients_get_what_generate_gives_though_some_leave(options: dict[str, Any]) -> None:
    """Requests wait, start, are preempted and end at all times; what was left early is a beginning of the same."""
    count, chance = 24, random.Random(5)
    prompts = [PROMPTS[i % len(PROMPTS)] + "x" * (7 * i % 50) for i in range(count)]
    params = [mixed_params(i) for i in range(count)]
    limits = {i: chance.randrange(5) for i in range(count) if chance.random() < 0.4}  # chunks until they leave
    starts = [chance.random() * 0.2 for _ in range(count)]
    llm = bundled(
        dtype="float32", max_num_seqs=6, max_model_len=128, kv_cache_memory=2 << 20, prefill_chunk=16, **options
    )
    expected = llm.generate(prompts, params)

    async def client(engine: AsyncEngine, index: int) -> None:
        await asyncio.sleep(starts[index])
        stream = engine.submit(llm.encode(prompts[index]), params[index])
        got = await read(stream, params[index].n, limits.get(index))
        stream.cancel()
        for mine, whole in zip(got, expected[index].outputs, strict=True):
            if index in limits and mine.finish_reason is None:
                assert whole.token_ids[: len(mine.token_ids)] == mine.token_ids
                assert whole.text.startswith(mine.text)
            else:
                assert (mine.token_ids, mine.text) == (whole.token_ids, whole.text)
                assert (mine.finish_reason, mine.error) == (whole.finish_reason, None)
                assert len(mine.logprobs or ()) == len(whole.logprobs or ())
                assert mine.metrics.output_tokens == len(mine.token_ids)

    async def test() -> None:
        async with serving(llm) as engine:
            await asyncio.gather(*(client(engine, i) for i in range(count)))
            await engine.drain()
            assert engine.load == EngineLoad(0, 0, 0.0)
            assert_nothing_held(llm)

    run(test())


def test_a_round_s_chunks_cross_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        async with serving(max_num_seqs=8) as engine:
            loop, calls = asyncio.get_running_loop(), []
            right = loop.call_soon_threadsafe
            monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *args: (calls.append(args), right(*args))[1])
            before = engine.llm.engine.stats.rounds
            streams = [engine.submit(engine.llm.encode(prompt), greedy()) for prompt in PROMPTS]
            await asyncio.gather(*map(read, streams))
            rounds = engine.llm.engine.stats.rounds - before
            assert 0 < len(calls) <= rounds

    run(test())


def test_an_idle_engine_waits_without_looking() -> None:
    async def test() -> None:
        async with serving() as engine:
            await read(engine.submit([5, 6, 7], greedy(4)))
            rests, right = [], engine._thread._rest
            engine._thread._rest = lambda: (rests.append(1), right())[1]  # type: ignore[method-assign]
            await asyncio.sleep(0.2)
            assert len(rests) <= 1

    run(test())


@pytest.mark.parametrize("state", ["waiting", "in its prompt", "decoding"])
def test_who_cancels_holds_nothing_after_the_round_under_way(state: str) -> None:
    llm = bundled(max_num_seqs=1 if state == "waiting" else 2, prefill_chunk=16, max_num_batched_tokens=16)
    hooked = hook(llm.engine)

    async def test() -> None:
        async with serving(llm) as engine:
            other = engine.submit(llm.encode(PROMPTS[0]), greedy(300))
            await anext(other)
            victim = engine.submit([7] * 200, greedy(200))
            (victim_id,) = victim._mailbox._indices

            def computed(plans: list[TargetPlan]) -> list[int]:
                return [work.end for plan in plans for work in plan.work if work.state.request_id == victim_id]

            if state == "decoding":
                await anext(victim)
            elif state == "in its prompt":
                await until(lambda: bool(computed([*hooked.plans])))
            with held(hooked) as hold:
                await hold.until_reached()
                held_round = len(hooked.plans)
                assert {"waiting": 0, "in its prompt": 199, "decoding": 999}[state] >= max(
                    computed(hooked.plans), default=0
                )
                assert (victim_id in llm.engine.scheduler.requests) is True
                victim.cancel()
                victim.cancel()
                assert [chunk async for chunk in victim] == []
                hold.release()
                await until(lambda: len(hooked.plans) > held_round)
                assert victim_id not in llm.engine.scheduler.requests
            assert not computed(hooked.plans[held_round:])
            other.cancel()
            await engine.drain()
            assert_nothing_held(llm)

    run(test())


@pytest.mark.parametrize("how", ["task", "timeout", "garbage", "with", "aclose"])
def test_a_client_that_vanishes_is_one_that_cancels(how: str) -> None:
    async def test() -> None:
        async with serving(max_num_seqs=2) as engine:
            stream = engine.submit([5, 6, 7], greedy(500, n=2))
            await anext(stream)
            requests = list(engine.llm.engine.scheduler.requests.values())
            if how == "task":
                task = asyncio.create_task(read(stream, 2))
                await asyncio.sleep(0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            elif how == "timeout":
                with pytest.raises(asyncio.TimeoutError):
                    await asyncio.wait_for(read(stream, 2), 0.01)
            elif how == "with":
                async with stream:
                    pass
            elif how == "aclose":
                await stream.aclose()
            kept = stream if how in ("task", "timeout") else None
            del stream
            gc.collect()
            await until(lambda: engine.load.running + engine.load.waiting == 0)
            assert kept is None or [chunk async for chunk in kept] == []
            assert [request.metrics.output_tokens < 500 for request in requests] == [True, True]
            assert_nothing_held(engine.llm)

    run(test())


def test_a_stream_that_is_read_twice_at_once_says_so_and_goes_on() -> None:
    llm = bundled()
    hooked = hook(llm.engine)

    async def test() -> None:
        async with serving(llm) as engine:
            with held(hooked):
                stream = engine.submit([5, 6, 7], greedy(8))
                first = asyncio.create_task(read(stream))
                await asyncio.sleep(0)
                with pytest.raises(RuntimeError, match="another task"):
                    await anext(stream)
            (output,) = await first
            assert len(output.token_ids) == 8

    run(test())


def test_what_nobody_reads_is_one_chunk_of_each_output_and_blocks_nobody() -> None:
    params = SamplingParams(max_tokens=120, ignore_eos=True, temperature=1.0, seed=3, n=3, logprobs=1)
    llm = bundled(dtype="float32")
    (expected,) = llm.generate("import os", params)

    async def test() -> None:
        async with serving(llm) as engine:
            slow = engine.submit(llm.encode("import os"), params)
            await read(engine.submit([5, 6, 7], greedy(200)))
            await engine.drain()
            assert len(slow._mailbox._unread) == 3
            chunks = [chunk async for chunk in slow]
            assert sorted(chunk.index for chunk in chunks) == [0, 1, 2]
            for chunk in chunks:
                whole = expected.outputs[chunk.index]
                assert (list(chunk.token_ids), chunk.text) == (whole.token_ids, whole.text)
                assert (list(chunk.drafted), chunk.finish_reason) == (whole.drafted, whole.finish_reason)
                assert [one.logprob for one in chunk.logprobs or ()] == pytest.approx(
                    [one.logprob for one in whole.logprobs or ()], abs=1e-4
                )

    run(test())


def test_the_queue_is_bounded_and_takes_all_outputs_of_a_prompt_or_none() -> None:
    llm = bundled(max_num_seqs=1, max_waiting=3)
    hooked = hook(llm.engine)

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
            await engine.drain()
            assert_nothing_held(llm)

    run(test())


def test_load_tells_what_runs_and_waits() -> None:
    llm = bundled(max_num_seqs=2)
    hooked = hook(llm.engine)

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


def test_too_few_pages_for_all_at_once_cost_no_token() -> None:
    llm = bundled(max_model_len=96, kv_cache_memory=1 << 20, max_num_seqs=4, dtype="float32")
    params = [greedy(60, temperature=1.0, seed=i) for i in range(4)]
    expected = llm.generate(list(PROMPTS[:4]), params)

    async def test() -> None:
        async with serving(llm) as engine:
            streams = [engine.submit(llm.encode(p), one) for p, one in zip(PROMPTS[:4], params, strict=True)]
            outputs = [output for (output,) in await asyncio.gather(*map(read, streams))]
            assert [o.token_ids for o in outputs] == [e.outputs[0].token_ids for e in expected]
            assert any(o.metrics.preemptions for o in outputs)
            await engine.drain()
            assert_nothing_held(llm)

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
    llm = bundled()
    hooked = hook(llm.engine)

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


def test_nobody_else_may_drive_its_llm() -> None:
    llm = bundled()
    with pytest.raises(ConfigurationError, match="round_limit"):
        AsyncEngine(llm, round_limit=0)

    async def test() -> None:
        with llm.stream("x", greedy()) as stream:
            next(stream)
            with pytest.raises(EngineInUseError, match="streams that have not ended"):
                AsyncEngine(llm)
        async with serving(llm):
            for call in (lambda: llm.generate("x", greedy()), lambda: AsyncEngine(llm)):
                with pytest.raises(EngineInUseError, match="pearl-engine"):
                    call()

    run(test())


@pytest.mark.parametrize("when", ["between rounds", "in a round"])
def test_another_event_loop_may_follow_one_that_is_closed(when: str) -> None:
    """Whoever was on the closed one has gone."""
    llm = bundled(max_num_seqs=1)
    hooked = hook(llm.engine)
    engine, requests = AsyncEngine(llm), []

    async def leave_a_stream(hold: Hold | None) -> AsyncStream:
        stream = engine.submit([5, 6, 7], greedy(500))
        if hold is None:
            await anext(stream)
        else:
            await hold.until_reached()
        requests.extend(llm.engine.scheduler.requests.values())
        return stream

    async def go_on(hold: Hold | None) -> None:
        stream = engine.submit([5, 6, 7], greedy(20))
        if hold is not None:
            hold.release()
        (output,) = await read(stream)
        assert len(output.token_ids) == 20
        await engine.drain()
        assert requests[0].metrics.output_tokens < 500
        assert_nothing_held(llm)
        await engine.close()

    async def look_away() -> None:
        await until(lambda: engine.load.running + engine.load.waiting == 0)
        assert requests[0].metrics.output_tokens < 500

    if when == "between rounds":
        left = run(leave_a_stream(None))
        run(look_away())
        run(go_on(None))
    else:
        with held(hooked) as hold:
            left = run(leave_a_stream(hold))
            hooked.before = lambda plan: None
            run(go_on(hold))
    del left


def test_all_clients_are_on_one_event_loop() -> None:
    async def test() -> None:
        async with serving() as engine:
            stream = engine.submit([5, 6, 7], greedy(100))

            def elsewhere() -> None:
                async def submit() -> None:
                    engine.submit([5], greedy())

                asyncio.run(submit())

            with pytest.raises(EngineInUseError, match="another event loop"):
                await asyncio.to_thread(elsewhere)
            (output,) = await read(stream)
            assert len(output.token_ids) == 100

    run(test())

"""Many clients of one engine: each gets its own output, whatever the others do."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from async_support import (
    PROMPTS,
    assert_drains_empty,
    assert_nothing_held,
    bundled,
    greedy,
    held,
    hooked_llm,
    read,
    run,
    serving,
)

from pearl import SamplingParams
from pearl.serving.async_engine import AsyncEngine
from pearl.serving.health import EngineLoad


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


def test_a_stream_that_is_read_twice_at_once_says_so_and_goes_on() -> None:
    llm, hooked = hooked_llm()

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
            await assert_drains_empty(engine)

    run(test())

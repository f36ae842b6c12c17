"""Clients that cancel or vanish: what they asked for ends, and holds nothing."""

from __future__ import annotations

import asyncio
import gc

import pytest
from async_support import (
    PROMPTS,
    assert_drains_empty,
    assert_nothing_held,
    greedy,
    held,
    hooked_llm,
    read,
    run,
    serving,
    until,
)

from pearl.messages import TargetPlan


@pytest.mark.parametrize("state", ["waiting", "in its prompt", "decoding"])
def test_who_cancels_holds_nothing_after_the_round_under_way(state: str) -> None:
    llm, hooked = hooked_llm(max_num_seqs=1 if state == "waiting" else 2, prefill_chunk=16, max_num_batched_tokens=16)

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
            await assert_drains_empty(engine)

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

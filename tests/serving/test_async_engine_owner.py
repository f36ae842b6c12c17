"""Whose an engine is: its LLM is nobody else's, its clients are on one event loop, and it ends if nobody has it."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest
from async_support import (
    PATIENCE,
    Hold,
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

from pearl import ConfigurationError, EngineInUseError
from pearl.serving.async_engine import AsyncEngine
from pearl.serving.async_stream import AsyncStream


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
    llm, hooked = hooked_llm(max_num_seqs=1)
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


FORGOTTEN = """
import asyncio, sys
from pearl import LLM, SamplingParams
from pearl.serving.async_engine import AsyncEngine

engine = AsyncEngine(LLM(device="cpu", draft_threads=2, target_threads=2))

async def main():
    global stream
    stream = engine.submit([5, 6, 7], SamplingParams(max_tokens=1500, ignore_eos=True))
    async for chunk in stream:
        print(len(chunk.token_ids) > 0)
        return

if sys.argv[1] != "idle":
    asyncio.run(main())
if sys.argv[1] == "garbage":
    del engine, stream
print("end")
"""


@pytest.mark.parametrize("state", ["idle", "busy", "garbage"])
def test_a_program_that_forgets_to_close_ends(state: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORGOTTEN, state], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["end"] if state == "idle" else ["True", "end"]


def test_an_engine_that_is_garbage_ends_its_thread() -> None:
    async def test() -> None:
        engine = AsyncEngine(bundled())
        thread, stream = thread_of(engine), engine.submit([5, 6, 7], greedy(400))
        await anext(stream)
        del engine
        assert (await errors_of(stream))[-1] == "the engine was closed before this output had ended"
        assert not thread.is_alive()

    run(test())

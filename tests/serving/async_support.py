"""Engines of the bundled pair under AsyncEngine, rounds that a test holds, and a bound on all of it."""

from __future__ import annotations

import asyncio
import faulthandler
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pearl import LLM, SamplingParams
from pearl.messages import TargetOutput, TargetPlan
from pearl.outputs import CompletionOutput
from pearl.serving.async_engine import AsyncEngine
from pearl.serving.async_stream import AsyncStream

T = TypeVar("T")
PATIENCE = 60.0  # seconds; nothing here takes as many
PROMPTS = ("import os\n", "def add(a, b):\n", "class Node:\n    ", "for i in range(", "try:\n    x =", "# a test\n")


def run(test: Coroutine[Any, Any, T]) -> T:
    """On an event loop of its own. A test that hangs ends, if need be with the process."""
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
    try:
        return asyncio.run(asyncio.wait_for(test, PATIENCE))
    finally:
        faulthandler.cancel_dump_traceback_later()


def bundled(**options: Any) -> LLM:
    return LLM(**{"device": "cpu", "draft_threads": 1, "target_threads": 1, "max_model_len": 512, **options})


@asynccontextmanager
async def serving(
    llm: LLM | None = None, round_limit: float | None = None, **options: Any
) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(bundled(**options) if llm is None else llm, round_limit=round_limit)
    try:
        yield engine
    finally:
        await engine.close()


def greedy(max_tokens: int = 24, **params: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)


async def read(stream: AsyncStream, outputs: int = 1, most: int | None = None) -> list[CompletionOutput]:
    """What the stream brings, or its first ``most`` chunks."""
    read = [CompletionOutput(index) for index in range(outputs)]
    if most == 0:
        return read
    async for chunk in stream:
        read[chunk.index].extend(chunk)
        most = most and most - 1
        if most == 0:
            break
    return read


async def errors_of(stream: AsyncStream) -> list[str | None]:
    """Of each chunk."""
    return [chunk.error async for chunk in stream]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # the test's bound ends it
        await asyncio.sleep(0.001)


def thread_of(engine: AsyncEngine) -> threading.Thread:
    (thread,) = [argument for argument in engine._join.args if isinstance(argument, threading.Thread)]
    return thread


def assert_nothing_held(llm: LLM) -> None:
    """Called when the engine rests."""
    scheduler = llm.engine.scheduler
    assert not llm.driver._readers
    assert not scheduler.requests
    assert not scheduler.has_work
    assert len(scheduler._free_lanes) == llm.config.max_num_seqs
    for kv in filter(None, (scheduler.target_kv, scheduler.draft_kv)):
        kv.check_integrity()
        assert kv.num_free_pages == kv.num_pages


async def assert_drains_empty(engine: AsyncEngine) -> None:
    await engine.drain()
    assert_nothing_held(engine.llm)


@dataclass
class Hook:
    """In the place of a target's ``run``: what a test wants to happen in rounds. ``plans``: of all of them."""

    right: Callable[[TargetPlan], TargetOutput]
    before: Callable[[TargetPlan], None] = lambda plan: None
    after: Callable[[TargetPlan, TargetOutput], None] = lambda plan, output: None
    plans: list[TargetPlan] = field(default_factory=list)

    def __call__(self, plan: TargetPlan) -> TargetOutput:
        self.plans.append(plan)
        self.before(plan)
        output = self.right(plan)
        self.after(plan, output)
        return output


def hooked_llm(**options: Any) -> tuple[LLM, Hook]:
    llm = bundled(**options)
    hook = Hook(llm.engine.workers.target.run)
    llm.engine.workers.target.run = hook  # type: ignore[method-assign]
    return llm, hook


class Hold:
    """Keeps the engine's thread inside a round."""

    def __init__(self) -> None:
        self.reached, self._released = threading.Event(), threading.Event()

    def __call__(self, plan: TargetPlan) -> None:
        self.reached.set()
        assert self._released.wait(PATIENCE)

    def release(self) -> None:
        self._released.set()

    async def until_reached(self) -> None:
        await until(self.reached.is_set)


@contextmanager
def held(hooked: Hook) -> Iterator[Hold]:
    """From now on no round ends, until the block does or the hold is released."""
    hold = Hold()
    hooked.before = hold
    try:
        yield hold
    finally:
        hooked.before = lambda plan: None
        hold.release()

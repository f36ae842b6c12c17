"""The outputs that one HTTP request asks for, of one prompt or several, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from pearl.errors import PearlError, RoundError
from pearl.outputs import CompletionOutput, StreamChunk
from pearl.sampling_params import SamplingParams
from pearl.serving.async_stream import AsyncStream
from pearl.serving.errors import api_error
from pearl.serving.round_log import RoundLog
from pearl.serving.service import Service

_WAITING = 64  # chunks; beyond that each stream joins its own
Jobs = Sequence[tuple[Sequence[int], SamplingParams]]


class Generation:
    """Outputs are numbered through: ``n`` for each prompt. Its end, in whatever way, aborts what has not ended."""

    def __init__(self, service: Service, request_id: str, jobs: Jobs, with_rounds: bool = False) -> None:
        """Queues all prompts or none. Raises what ``AsyncEngine.submit`` does. ``with_rounds``: keeps a log of them."""
        self.id = request_id
        self.prompts = [ids for ids, _ in jobs]
        self.per_prompt = jobs[0][1].n
        self.outputs = [CompletionOutput(index) for index in range(len(jobs) * self.per_prompt)]
        self._streams: list[AsyncStream] = []
        self._engine = service.engine
        self.rounds: RoundLog | None = None
        if with_rounds:
            self.rounds = RoundLog([params for _, params in jobs])
            self._engine.observe(self.rounds)
        try:
            for ids, params in jobs:
                self._streams.append(service.engine.submit(ids, params))
        except PearlError as error:
            self._cancel()
            service.metrics.refused(api_error(error).code or "invalid")
            raise
        self._record = service.metrics.begin(request_id, [len(ids) for ids in self.prompts], len(self.outputs))

    def prompt_of(self, index: int) -> Sequence[int]:
        return self.prompts[index // self.per_prompt]

    async def chunks(self) -> AsyncGenerator[StreamChunk, None]:
        """Chunks of all outputs, in the order of arrival. RoundError if the engine gave one up; the rest ends too."""
        record = self._record
        try:
            async with aclosing(self._merged()) as merged:
                async for chunk in merged:
                    if chunk.error is not None:
                        record.failed(chunk.error)
                        raise RoundError(chunk.error)
                    self.outputs[chunk.index].metrics = chunk.metrics
                    record.saw(chunk)
                    yield chunk
            if record.outcome == "cancelled":
                raise RoundError("the engine stopped before this output had ended")
        finally:
            self.close()

    async def complete(self) -> list[CompletionOutput]:
        async with aclosing(self.chunks()) as chunks:
            async for chunk in chunks:
                self.outputs[chunk.index].extend(chunk)
        return self.outputs

    async def _merged(self) -> AsyncGenerator[StreamChunk, None]:
        if len(self._streams) == 1:
            async for chunk in self._streams[0]:
                yield chunk
            return
        arrived: asyncio.Queue[StreamChunk | BaseException | None] = asyncio.Queue(_WAITING)
        tasks = [
            asyncio.ensure_future(_forward(stream, position * self.per_prompt, arrived))
            for position, stream in enumerate(self._streams)
        ]
        try:
            unfinished = len(tasks)
            while unfinished:
                item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    unfinished -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def close(self) -> None:
        """Abort what has not ended, and write down what became of it. Idempotent."""
        self._cancel()
        self._record.end()

    def _cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()
        if self.rounds is not None:
            self._engine.forget(self.rounds)


async def _forward(stream: AsyncStream, first: int, arrived: asyncio.Queue[StreamChunk | BaseException | None]) -> None:
    """``first``: the number of the stream's first output."""
    try:
        async for chunk in stream:
            await arrived.put(replace(chunk, index=first + chunk.index))
    except Exception as error:
        await arrived.put(error)
    else:
        await arrived.put(None)

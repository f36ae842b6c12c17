"""The outputs that one HTTP request asks for, of one prompt or several, as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import aclosing
from dataclasses import replace

from pearl.errors import PearlError, RoundError
from pearl.grammars import Grammar
from pearl.messages import PromptLogprobs
from pearl.outputs import CompletionOutput, FinishReason, StreamChunk
from pearl.prompts import ReadPrompt
from pearl.sampling_params import SamplingParams
from pearl.serving.async_stream import AsyncStream
from pearl.serving.errors import api_error
from pearl.serving.round_log import RoundLog
from pearl.serving.service import Service

_WAITING = 64  # chunks; beyond that each stream joins its own
Jobs = Sequence[tuple[Sequence[int], SamplingParams]]


class Generation:
    """Outputs are numbered through: ``n`` for each prompt. Its end, in whatever way, aborts what has not ended."""

    def __init__(
        self,
        service: Service,
        request_id: str,
        jobs: Jobs,
        *,
        prompts_alone: bool = False,
        grammar: Grammar | None = None,
        shown: Collection[int] = (),
        with_rounds: bool = False,
    ) -> None:
        """Queues all prompts or none. Raises what ``AsyncEngine.submit`` does.

        ``prompts_alone``: what is generated is left out; outputs are empty, and as long as was wanted. ``grammar``: of
        all outputs. ``shown``: special tokens whose names are part of the text. ``with_rounds``: keeps a log of them.
        """
        self.id, self.shown = request_id, shown
        self.prompts = [ids for ids, _ in jobs]
        self.per_prompt = jobs[0][1].n
        self._most_of_prompts = jobs[0][1].prompt_logprobs
        self.tells_prompts = self._most_of_prompts is not None
        self._prompts_alone = prompts_alone
        self.outputs = [CompletionOutput(index) for index in range(len(jobs) * self.per_prompt)]
        self._streams: list[AsyncStream] = []
        self._engine = service.engine
        self.rounds: RoundLog | None = None
        if with_rounds:
            self.rounds = RoundLog([params for _, params in jobs])
            self._engine.observe(self.rounds)
        try:
            for ids, params in jobs:
                prompt = ReadPrompt(token_ids=list(ids))
                self._streams.append(service.engine.submit(prompt, params, grammar=grammar, shown=shown))
        except PearlError as error:
            self._cancel()
            service.metrics.refused(api_error(error).code or "invalid")
            raise
        self._record = service.metrics.begin(request_id, [len(ids) for ids in self.prompts], len(self.outputs))

    @property
    def told_of_prompts(self) -> int:
        """How many numbers an answer tells of prompts."""
        return sum(map(len, self.prompts)) * self.per_prompt * (1 + (self._most_of_prompts or 0))

    def prompt_of(self, index: int) -> Sequence[int]:
        return self.prompts[index // self.per_prompt]

    def prompt_logprobs_of(self, index: int) -> PromptLogprobs | None:
        """What is known of an output's prompt when its first chunk has come, where that was asked for."""
        return self.outputs[index - index % self.per_prompt].prompt_logprobs

    async def chunks(self) -> AsyncGenerator[StreamChunk, None]:
        """Chunks of all outputs, in the order of arrival. RoundError if the engine gave one up; the rest ends too."""
        record = self._record
        try:
            async with aclosing(self._ordered()) as ordered:
                async for chunk in ordered:
                    if chunk.error is not None:
                        record.failed(chunk.error)
                        raise RoundError(chunk.error)
                    output = self.outputs[chunk.index]
                    output.metrics = chunk.metrics
                    if chunk.prompt_logprobs is not None:
                        output.prompt_logprobs = chunk.prompt_logprobs
                    if self._prompts_alone:
                        chunk = _without_tokens(chunk)
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

    async def _ordered(self) -> AsyncGenerator[StreamChunk, None]:
        """As they come; but where prompts are told, an output waits for the first one's first chunk, which does it."""
        waiting = {prompt: list[StreamChunk]() for prompt in range(len(self.prompts) if self.tells_prompts else 0)}
        async with aclosing(self._merged()) as merged:
            async for chunk in merged:
                held = waiting.get(prompt := chunk.index // self.per_prompt)
                if held is None or chunk.error is not None:
                    yield chunk
                elif chunk.prompt_logprobs is None:
                    held.append(chunk)
                else:
                    yield chunk
                    for after in waiting.pop(prompt):
                        yield after

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


def _without_tokens(chunk: StreamChunk) -> StreamChunk:
    reason: FinishReason | None = None if chunk.finish_reason is None else "length"
    logprobs = None if chunk.logprobs is None else ()
    return replace(chunk, text="", token_ids=(), drafted=(), sources=(), finish_reason=reason, logprobs=logprobs)

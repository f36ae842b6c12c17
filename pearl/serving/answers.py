"""How an answer is written: as one object, or as events while it grows. Both APIs differ in the objects alone."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from pearl.outputs import CompletionOutput, StreamChunk
from pearl.serving.connection import while_connected
from pearl.serving.event_stream import EventStream, as_json
from pearl.serving.generation import Generation
from pearl.serving.protocol import SamplingFields
from pearl.serving.service import Service
from pearl.serving.token_sources import TokenSources
from pearl.serving.usage import statistics, usage


class Shape(Protocol):
    """An API's own objects."""

    kind: str  # the answer's ``object``
    chunk_kind: str  # that of an event

    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        """Of a whole output, without ``index``, ``finish_reason`` and ids."""
        ...

    def opening(self, index: int) -> str:
        """Members of the choice in the event that opens an output, in JSON; "": there is no such event."""
        ...

    def piece(self, chunk: StreamChunk) -> str:
        """Members of the choice in the event of a chunk, in JSON: built by hand, since there is one every round."""
        ...


@dataclass(frozen=True)
class Wishes:
    """What a request wants to be told beside the text."""

    usage: bool = False
    usage_always: bool = False
    metrics: bool = False
    token_ids: bool = False
    token_sources: bool = False
    logprobs: bool = False

    @classmethod
    def of(cls, body: SamplingFields, logprobs: bool) -> Wishes:
        options = body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        always = options is not None and bool(options.continuous_usage_stats)
        tokens = (bool(body.return_token_ids), bool(body.return_token_sources))
        return cls(with_usage, with_usage and always, bool(body.metrics), *tokens, logprobs)


class Answer:
    def __init__(self, service: Service, generation: Generation, shape: Shape, wishes: Wishes) -> None:
        self._service, self._generation, self._shape, self._wishes = service, generation, shape, wishes
        self._sources = TokenSources(service.engine.llm.tokenizer, generation)
        self._base = {"id": generation.id, "created": int(time.time()), "model": service.settings.name}

    async def respond(self, request: Request, stream: bool) -> Response:
        """Ends the generation if the client leaves: ClientGone. RoundError if the engine gives up before a token."""
        generation = self._generation
        try:
            if not stream:
                outputs = await while_connected(request.receive, generation.complete())
                return Response(as_json(self.whole(outputs)), media_type="application/json")
            events = self.events()
            first = await while_connected(request.receive, anext(events))
            return EventStream(first, events, generation.close)
        except BaseException:
            generation.close()
            raise

    def whole(self, outputs: Sequence[CompletionOutput]) -> dict[str, Any]:
        choices = []
        for output in outputs:
            choice = {"index": output.index, **self._shape.choice(output), "finish_reason": output.finish_reason}
            if self._wishes.token_ids:
                choice["token_ids"] = output.token_ids
                choice["prompt_token_ids"] = self._generation.prompt_of(output.index)
            if self._wishes.token_sources:
                choice |= self._sources.of(output)
            choices.append(choice)
        answer = {**self._base, "object": self._shape.kind, "choices": choices}
        answer["usage"] = self._usage(sum(len(output.token_ids) for output in outputs))
        if (rounds := self._generation.rounds) is not None:
            answer["rounds"] = rounds.take()
        return answer | ({"metrics": self._statistics()} if self._wishes.metrics else {})

    async def events(self) -> AsyncGenerator[bytes, None]:
        shape, wishes = self._shape, self._wishes
        base = as_json({**self._base, "object": shape.chunk_kind})[:-1]
        head, generated, opened = f'data: {base},"choices":[{{"index":', 0, set[int]()
        tail = ',"usage":null}\n\n' if wishes.usage else "}\n\n"
        # About tokens without text there is nothing to say.
        silent = not (wishes.logprobs or wishes.token_ids or wishes.token_sources or wishes.usage_always)
        async with aclosing(self._generation.chunks()) as chunks:
            async for chunk in chunks:
                index = chunk.index
                generated += len(chunk.token_ids)
                event = ""
                if index not in opened:
                    opened.add(index)
                    if members := shape.opening(index):
                        event = f'{head}{index},{members},"finish_reason":null}}]{tail}'
                if silent and not chunk.text and chunk.finish_reason is None:
                    if event:
                        yield event.encode()
                    continue
                reason = "null" if chunk.finish_reason is None else f'"{chunk.finish_reason}"'
                if wishes.usage_always:
                    tail = f',"usage":{as_json(self._usage(generated))}}}\n\n'
                tokens = self._of_tokens(chunk)
                event += f'{head}{index},{shape.piece(chunk)},"finish_reason":{reason}{tokens}}}]{self._rounds()}{tail}'
                yield event.encode()
        if wishes.usage or wishes.metrics:
            yield self._closing(base, generated)

    def _of_tokens(self, chunk: StreamChunk) -> str:
        """More members of a choice."""
        members = f',"token_ids":{as_json(chunk.token_ids)}' if self._wishes.token_ids else ""
        if self._wishes.token_sources:
            members += f",{as_json(self._sources.of(chunk))[1:-1]}"
        return members

    def _rounds(self) -> str:
        """A member beside the choices."""
        rounds = self._generation.rounds
        return "" if rounds is None else f',"rounds":{as_json(rounds.take())}'

    def _closing(self, base: str, generated: int) -> bytes:
        """The event behind all choices."""
        members = f',"usage":{as_json(self._usage(generated))}' if self._wishes.usage else ""
        if self._wishes.metrics:
            members += f',"metrics":{as_json(self._statistics())}'
        return f'data: {base},"choices":[]{members}}}\n\n'.encode()

    def _usage(self, generated: int) -> dict[str, Any]:
        outputs, n = self._generation.outputs, self._generation.per_prompt
        cached = sum(output.metrics.cached_tokens for output in outputs[::n])
        return usage(sum(map(len, self._generation.prompts)), generated, cached)

    def _statistics(self) -> dict[str, Any]:
        config = self._service.engine.llm.config
        window = config.largest_window if config.uses_draft else 0
        return statistics([output.metrics for output in self._generation.outputs], window)

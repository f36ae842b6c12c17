"""How an answer is written: as one object, or as events while it grows. Both APIs differ in the objects alone."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from pearl.outputs import CompletionOutput, StreamChunk
from pearl.serving.connection import while_connected
from pearl.serving.event_stream import EventStream, as_json
from pearl.serving.generation import Generation
from pearl.serving.logprobs import ranked_logprobs
from pearl.serving.protocol import SamplingFields
from pearl.serving.service import Service
from pearl.serving.token_sources import TokenSources
from pearl.serving.usage import statistics, usage

T = TypeVar("T")


class Piece(NamedTuple):
    """``members``: in JSON. ``says``: whether they tell anything beside what is told of the tokens and the end.

    ``earlier``: members of events before it, about which nothing more is told.
    """

    members: str
    says: bool
    finish_reason: str | None
    earlier: Sequence[str] = ()


class Shape(Protocol):
    """An API's own objects."""

    kind: str  # the answer's ``object``
    chunk_kind: str  # that of an event
    of_one_prompt: bool  # what is told of it stands beside the choices, else in each

    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        """Of a whole output, without ``index`` and ids."""
        ...

    def opening(self, index: int) -> str:
        """Members of the choice in the event that opens an output, in JSON; "": there is no such event."""
        ...

    def piece(self, chunk: StreamChunk) -> Piece:
        """Of the choice in the event of a chunk: built by hand, since there is one every round."""
        ...

    def reasoning_tokens(self) -> int | None:
        """Of all outputs so far; None where reasoning is not told from answers."""
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
    prompt_logprobs: int | None = None  # how many alternatives, in vLLM's form

    @classmethod
    def of(cls, body: SamplingFields, logprobs: bool) -> Wishes:
        options = body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        always = options is not None and bool(options.continuous_usage_stats)
        tokens = (bool(body.return_token_ids), bool(body.return_token_sources))
        return cls(with_usage, with_usage and always, bool(body.metrics), *tokens, logprobs, body.prompt_logprobs)


class Answer:
    def __init__(self, service: Service, generation: Generation, shape: Shape, wishes: Wishes) -> None:
        self._service, self._generation, self._shape, self._wishes = service, generation, shape, wishes
        self._sources = TokenSources(service.engine.llm.tokenizer, generation)
        self._of_prompts: dict[int, str] = {}  # by their first outputs
        self._base = {"id": generation.id, "created": int(time.time()), "model": service.settings.name}

    async def respond(self, request: Request, stream: bool) -> Response:
        """Ends the generation if the client leaves: ClientGone. RoundError if the engine gives up before a token."""
        generation = self._generation
        try:
            if not stream:
                outputs = await while_connected(request.receive, generation.complete())
                written = await self._written(lambda: self.whole(outputs), generation.tells_prompts)
                return Response(written, media_type="application/json")
            events = self.events()
            first = await while_connected(request.receive, anext(events))
            return EventStream(first, events, generation.close)
        except BaseException:
            generation.close()
            raise

    async def _written(self, write: Callable[[], T], tells_prompts: bool) -> T:
        """A part of the answer. What tells of prompts may take long."""
        if not tells_prompts:
            return write()
        return await self._service.texts.run(write, self._generation.told_of_prompts)

    def whole(self, outputs: Sequence[CompletionOutput]) -> str:
        """In JSON, which is written choice by choice: while one is, no other thread runs Python."""
        choices = ",".join([self._choice(output) for output in outputs])
        head = as_json({**self._base, "object": self._shape.kind})[:-1]
        of_all: dict[str, Any] = {"usage": self._usage(sum(len(output.token_ids) for output in outputs))}
        if (rounds := self._generation.rounds) is not None:
            of_all["rounds"] = rounds.take()
        if self._wishes.metrics:
            of_all["metrics"] = self._statistics()
        of_prompt = self._of_prompt(0) if self._shape.of_one_prompt else ""
        return f'{head},"choices":[{choices}],{as_json(of_all)[1:-1]}{of_prompt}}}'

    def _choice(self, output: CompletionOutput) -> str:
        choice = {"index": output.index, **self._shape.choice(output)}
        if self._wishes.token_ids:
            choice["token_ids"] = output.token_ids
            choice["prompt_token_ids"] = self._generation.prompt_of(output.index)
        if self._wishes.token_sources:
            choice |= self._sources.of(output)
        of_prompt = "" if self._shape.of_one_prompt else self._of_prompt(output.index)
        return f"{as_json(choice)[:-1]}{of_prompt}}}"

    def _of_prompt(self, index: int) -> str:
        """More members, about an output's prompt: written once for all outputs, since they may be long."""
        first = index - index % self._generation.per_prompt
        if first not in self._of_prompts:
            most, found = self._wishes.prompt_logprobs, self._generation.prompt_logprobs_of(index)
            if most is None or found is None:
                return ""
            tokenizer, tokens = self._service.engine.llm.tokenizer, self._generation.prompt_of(index)
            told = ranked_logprobs(tokenizer, tokens, found, most)
            self._of_prompts[first] = f',"prompt_logprobs":{as_json(told)}'
        return self._of_prompts[first]

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
                piece = await self._written(partial(shape.piece, chunk), chunk.prompt_logprobs is not None)
                if silent and not piece.says and piece.finish_reason is None:
                    if event:
                        yield event.encode()
                    continue
                reason = "null" if piece.finish_reason is None else f'"{piece.finish_reason}"'
                if wishes.usage_always:
                    tail = f',"usage":{as_json(self._usage(generated))}}}\n\n'
                for members in piece.earlier:
                    event += f'{head}{index},{members},"finish_reason":null}}]{tail}'
                tokens, rounds = self._of_tokens(chunk), self._rounds()
                event += f'{head}{index},{piece.members},"finish_reason":{reason}{tokens}}}]{rounds}{tail}'
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
        return usage(sum(map(len, self._generation.prompts)), generated, cached, self._shape.reasoning_tokens())

    def _statistics(self) -> dict[str, Any]:
        config = self._service.engine.llm.config
        window = config.largest_window if config.uses_draft else 0
        return statistics([output.metrics for output in self._generation.outputs], window)

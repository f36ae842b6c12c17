"""POST /v1/completions"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from pearl.outputs import CompletionOutput, StreamChunk
from pearl.sampling_params import SamplingParams
from pearl.serving.answers import Answer, Piece, Wishes
from pearl.serving.event_stream import as_json
from pearl.serving.generation import Generation
from pearl.serving.logprobs import CompletionLogprobs
from pearl.serving.protocol import CompletionRequest
from pearl.serving.sampling import sampling_params
from pearl.serving.service import Service
from pearl.serving.structured import compiled

_MAX_TOKENS = 16  # OpenAI's


async def create_completion(service: Service, body: CompletionRequest, request: Request) -> Response:
    service.admit(body)
    wishes = Wishes.of(body, body.logprobs is not None)
    prompt_alone = bool(body.echo) and body.max_tokens == 0
    jobs, texts = [], []
    for index, prompt in enumerate(body.prompts):
        name = "prompt" if len(body.prompts) == 1 else f"prompt[{index}]"
        ids = await service.texts.prompt(prompt, body.add_special_tokens is not False, name)
        jobs.append((ids, _params(service, body, service.engine.llm.max_model_len - len(ids))))
        texts.append("" if not body.echo else prompt if isinstance(prompt, str) else await service.texts.decode(ids))
    grammar = await compiled(service.texts, body, jobs[0][1])
    generation = Generation(
        service, f"cmpl-{uuid4().hex}", jobs, prompts_alone=prompt_alone, grammar=grammar,
        with_rounds=bool(body.return_rounds),
    )  # fmt: skip
    shape = TextShape(service, generation, texts if body.echo else None, body.logprobs)
    return await Answer(service, generation, shape, wishes).respond(request, bool(body.stream))


def _params(service: Service, body: CompletionRequest, room: int) -> SamplingParams:
    max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if body.echo and not max_tokens:
        max_tokens = 1  # the least that an engine does; it is left out of the answer
    params = sampling_params(body, service.defaults, room, max_tokens, body.logprobs)
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=max(body.logprobs, body.prompt_logprobs or 0))
    return params


class TextShape:
    """``echoes``: what stands before the outputs of each prompt; None: nothing. ``logprobs``: how many alternatives."""

    kind = chunk_kind = "text_completion"
    of_one_prompt = False

    def __init__(
        self, service: Service, generation: Generation, echoes: list[str] | None, logprobs: int | None
    ) -> None:
        self._tokenizer = service.engine.llm.tokenizer
        self._generation, self._echoes, self._most = generation, echoes, logprobs
        self._forms: dict[int, CompletionLogprobs] = {}  # by output
        self._of_prompts: dict[int, dict[str, list[Any]]] = {}  # by their first outputs
        self._unsaid = {i: self._echo(i) for i in range(len(generation.outputs))}

    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        text = self._echo(output.index) + output.text
        return {"text": text, "logprobs": self._of(output), "finish_reason": output.finish_reason}

    def opening(self, index: int) -> str:
        return ""

    def piece(self, chunk: StreamChunk) -> Piece:
        text = self._unsaid.pop(chunk.index, "") + chunk.text
        members = f'"text":{as_json(text)},"logprobs":{as_json(self._of(chunk))}'
        return Piece(members, bool(text), chunk.finish_reason)

    def reasoning_tokens(self) -> None:
        return None

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._generation.per_prompt] if self._echoes else ""

    def _of(self, part: CompletionOutput | StreamChunk) -> dict[str, Any] | None:
        """Of the prompt too, with an output's first part."""
        if self._most is None:
            return None
        index, before = part.index, None
        form = self._forms.get(index)
        if form is None:
            prompt, echo = self._generation.prompt_of(index), self._echo(index)
            form = self._forms[index] = CompletionLogprobs(self._tokenizer, self._most, prompt, len(echo))
            before = self._of_prompt(index) if self._echoes else None
        told = form.of(part.token_ids, part.logprobs or ())
        return told if before is None else {name: before[name] + values for name, values in told.items()}

    def _of_prompt(self, index: int) -> dict[str, list[Any]]:
        first = index - index % self._generation.per_prompt
        if first not in self._of_prompts:
            found = self._generation.prompt_logprobs_of(index)
            assert self._most is not None
            assert found is not None
            form = CompletionLogprobs(self._tokenizer, self._most)
            self._of_prompts[first] = form.of(self._generation.prompt_of(index), found)
        return self._of_prompts[first]

"""POST /v1/completions"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from pearl.errors import InvalidRequestError
from pearl.outputs import CompletionOutput, StreamChunk
from pearl.serving.answers import Answer, Wishes
from pearl.serving.event_stream import as_json
from pearl.serving.generation import Generation
from pearl.serving.logprobs import CompletionLogprobs
from pearl.serving.protocol import CompletionRequest
from pearl.serving.sampling import sampling_params
from pearl.serving.service import Service

_MAX_TOKENS = 16  # OpenAI's


async def create_completion(service: Service, body: CompletionRequest, request: Request) -> Response:
    service.admit(body)
    if body.echo and body.logprobs is not None:
        raise InvalidRequestError("echo with logprobs is not supported yet: leave one of them out", "echo")
    jobs, texts = [], []
    max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    for index, prompt in enumerate(body.prompts):
        name = "prompt" if len(body.prompts) == 1 else f"prompt[{index}]"
        ids = await service.texts.prompt(prompt, body.add_special_tokens is not False, name)
        room = service.engine.llm.max_model_len - len(ids)
        jobs.append((ids, sampling_params(body, service.defaults, room, max_tokens, body.logprobs)))
        texts.append("" if not body.echo else prompt if isinstance(prompt, str) else await service.texts.decode(ids))
    generation = Generation(service, f"cmpl-{uuid4().hex}", jobs, bool(body.return_rounds))
    shape = TextShape(service, generation, texts, body.logprobs is not None)
    answer = Answer(service, generation, shape, Wishes.of(body, body.logprobs is not None))
    return await answer.respond(request, bool(body.stream))


class TextShape:
    """``echoes``: what stands before the outputs of each prompt."""

    kind = chunk_kind = "text_completion"

    def __init__(self, service: Service, generation: Generation, echoes: list[str], logprobs: bool) -> None:
        self._tokenizer = service.engine.llm.tokenizer
        self._generation, self._echoes, self._logprobs = generation, echoes, logprobs
        self._forms: dict[int, CompletionLogprobs] = {}  # by output
        self._unsaid = {i: self._echo(i) for i in range(len(generation.outputs))}

    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        return {"text": self._echo(output.index) + output.text, "logprobs": self._of(output)}

    def opening(self, index: int) -> str:
        return ""

    def piece(self, chunk: StreamChunk) -> str:
        text = self._unsaid.pop(chunk.index, "") + chunk.text
        logprobs = as_json(self._of(chunk)) if self._logprobs else "null"
        return f'"text":{as_json(text)},"logprobs":{logprobs}'

    def _echo(self, index: int) -> str:
        return self._echoes[index // self._generation.per_prompt]

    def _of(self, part: CompletionOutput | StreamChunk) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        form = self._forms.get(part.index)
        if form is None:
            form = CompletionLogprobs(self._tokenizer, self._generation.prompt_of(part.index))
            self._forms[part.index] = form
        return form.of(part.token_ids, part.logprobs or ())

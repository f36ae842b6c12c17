"""POST /v1/chat/completions"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from pearl.errors import InvalidRequestError
from pearl.models import Tokenizer
from pearl.outputs import CompletionOutput, StreamChunk
from pearl.serving.answers import Answer, Wishes
from pearl.serving.event_stream import as_json
from pearl.serving.generation import Generation
from pearl.serving.logprobs import chat_logprobs
from pearl.serving.protocol import ChatCompletionRequest
from pearl.serving.sampling import sampling_params
from pearl.serving.service import Service
from pearl.serving.texts import template_variables


async def create_chat_completion(service: Service, body: ChatCompletionRequest, request: Request) -> Response:
    service.admit(body)
    logprobs = _logprobs(body)
    ids = await service.texts.conversation(body.messages, template_variables(body))
    names, max_tokens = {"logprobs": "top_logprobs"}, body.max_tokens
    if body.max_completion_tokens is not None:
        max_tokens = body.max_completion_tokens
        names["max_tokens"] = "max_completion_tokens"
    room = service.engine.llm.max_model_len - len(ids)
    params = sampling_params(body, service.defaults, room, max_tokens, logprobs, names)
    generation = Generation(service, f"chatcmpl-{uuid4().hex}", [(ids, params)], bool(body.return_rounds))
    shape = ChatShape(service.engine.llm.tokenizer, logprobs is not None)
    answer = Answer(service, generation, shape, Wishes.of(body, logprobs is not None))
    return await answer.respond(request, bool(body.stream))


def _logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true", "top_logprobs")
    return None


class ChatShape:
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, logprobs: bool) -> None:
        self._tokenizer, self._logprobs = tokenizer, logprobs

    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": output.text}, "logprobs": self._of(output)}

    def opening(self, index: int) -> str:
        return '"delta":{"role":"assistant","content":""},"logprobs":null'

    def piece(self, chunk: StreamChunk) -> str:
        delta = f'{{"content":{as_json(chunk.text)}}}' if chunk.text else "{}"
        return f'"delta":{delta},"logprobs":{as_json(self._of(chunk)) if self._logprobs else "null"}'

    def _of(self, part: CompletionOutput | StreamChunk) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, part.token_ids, part.logprobs or ()) if self._logprobs else None

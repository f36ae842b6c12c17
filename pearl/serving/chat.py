"""POST /v1/chat/completions"""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from pearl.errors import InvalidRequestError
from pearl.serving.answers import Answer, Wishes
from pearl.serving.chat_shape import ChatShape, Markup
from pearl.serving.generation import Generation
from pearl.serving.protocol import ChatCompletionRequest
from pearl.serving.reasoning import leaves_open, opens_reasoning
from pearl.serving.sampling import sampling_params
from pearl.serving.service import Service
from pearl.serving.texts import template_variables
from pearl.serving.tool_use import ToolUse, tool_use


async def create_chat_completion(service: Service, body: ChatCompletionRequest, request: Request) -> Response:
    service.admit(body)
    logprobs = _logprobs(body)
    tools = tool_use(body, service.markup)
    if tools is not None and tools.schema is not None:
        raise InvalidRequestError("tool_choice: a call can be forced only with structured output", "tool_choice")
    variables = template_variables(body) | ({} if tools is None else {"tools": tools.tools})
    ids, prompt_end = await service.texts.conversation(body.messages, variables)
    names, max_tokens = {"logprobs": "top_logprobs"}, body.max_tokens
    if body.max_completion_tokens is not None:
        max_tokens = body.max_completion_tokens
        names["max_tokens"] = "max_completion_tokens"
    room = service.engine.llm.max_model_len - len(ids)
    params = sampling_params(body, service.defaults, room, max_tokens, logprobs, names)
    markup = _markup(service, body, tools, prompt_end)
    generation = Generation(service, f"chatcmpl-{uuid4().hex}", [(ids, params)], shown=markup.shown)
    shape = ChatShape(service.engine.llm.tokenizer, logprobs is not None, markup, generation)
    answer = Answer(service, generation, shape, Wishes.of(body, logprobs is not None))
    return await answer.respond(request, bool(body.stream))


def _logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true", "top_logprobs")
    return None


def _markup(service: Service, body: ChatCompletionRequest, tools: ToolUse | None, prompt_end: str) -> Markup:
    forced = tools is not None and tools.schema is not None
    has_reasoning = service.markup.has_reasoning and not forced  # a forced call has no place for it
    opened = has_reasoning and (opens_reasoning(prompt_end) or (_continues(body) and _is_open(body.messages)))
    return Markup(tools, has_reasoning, opened, service.markup.shown_tokens(tools is not None))


def _continues(body: ChatCompletionRequest) -> bool:
    return bool(body.continue_final_message or (body.chat_template_kwargs or {}).get("continue_final_message"))


def _is_open(messages: list[dict[str, Any]]) -> bool:
    content = messages[-1].get("content")
    return isinstance(content, str) and leaves_open(content)

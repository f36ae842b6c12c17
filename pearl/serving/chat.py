"""POST /v1/chat/completions"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import uuid4

from starlette.requests import Request
from starlette.responses import Response

from pearl.errors import InvalidRequestError
from pearl.grammars import Grammar
from pearl.sampling_params import SamplingParams
from pearl.serving.answers import Answer, Wishes
from pearl.serving.chat_shape import ChatShape, Markup
from pearl.serving.generation import Generation
from pearl.serving.protocol import ChatCompletionRequest
from pearl.serving.reasoning import leaves_open, opens_reasoning
from pearl.serving.sampling import sampling_params
from pearl.serving.service import Service
from pearl.serving.structured import compiled
from pearl.serving.texts import template_variables
from pearl.serving.tool_use import ToolUse, tool_use
from pearl.structured_output import StructuredOutput


async def create_chat_completion(service: Service, body: ChatCompletionRequest, request: Request) -> Response:
    service.admit(body)
    logprobs = _logprobs(body)
    tools = tool_use(body, service.markup)
    variables = template_variables(body) | ({} if tools is None else {"tools": tools.tools})
    ids, prompt_end = await service.texts.conversation(body.messages, variables)
    names, max_tokens = {"logprobs": "top_logprobs"}, body.max_tokens
    if body.max_completion_tokens is not None:
        max_tokens = body.max_completion_tokens
        names["max_tokens"] = "max_completion_tokens"
    room = service.engine.llm.max_model_len - len(ids)
    params = sampling_params(body, service.defaults, room, max_tokens, logprobs, names)
    params, grammar = await _form(service, body, params, tools)
    markup = _markup(service, body, tools, prompt_end, is_free=params.structured is None)
    generation = Generation(
        service, f"chatcmpl-{uuid4().hex}", [(ids, params)], grammar=grammar, shown=markup.shown,
        with_rounds=bool(body.return_rounds),
    )  # fmt: skip
    shape = ChatShape(service.engine.llm.tokenizer, logprobs is not None, markup, generation)
    answer = Answer(service, generation, shape, Wishes.of(body, logprobs is not None))
    return await answer.respond(request, bool(body.stream))


def _logprobs(body: ChatCompletionRequest) -> int | None:
    if body.logprobs:
        return body.top_logprobs or 0
    if body.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true", "top_logprobs")
    return None


async def _form(
    service: Service, body: ChatCompletionRequest, params: SamplingParams, tools: ToolUse | None
) -> tuple[SamplingParams, Grammar | None]:
    """With the form that the answer must have: what the client asks for, or a call that is forced."""
    if tools is None:
        return params, await compiled(service.texts, body, params)
    if params.structured is not None:
        name = "response_format" if body.structured_outputs is None else "structured_outputs"
        raise InvalidRequestError(f"{name} leaves no room for calls: leave tools out, or set tool_choice to none", name)
    if tools.schema is None:
        return params, None
    try:
        params = replace(params, structured=StructuredOutput(json=tools.schema))
        return params, await service.texts.grammar(params)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"tools: a call cannot be forced: {error}", "tools") from error


def _markup(
    service: Service, body: ChatCompletionRequest, tools: ToolUse | None, prompt_end: str, is_free: bool
) -> Markup:
    """``is_free``: the answer has no form that it must have, which would leave no place for reasoning."""
    has_reasoning = service.markup.has_reasoning and is_free
    opened = has_reasoning and (opens_reasoning(prompt_end) or (_continues(body) and _is_open(body.messages)))
    return Markup(tools, has_reasoning, opened, service.markup.shown_tokens(tools is not None))


def _continues(body: ChatCompletionRequest) -> bool:
    return bool(body.continue_final_message or (body.chat_template_kwargs or {}).get("continue_final_message"))


def _is_open(messages: list[dict[str, Any]]) -> bool:
    content = messages[-1].get("content")
    return isinstance(content, str) and leaves_open(content)

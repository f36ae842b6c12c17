"""POST /tokenize, POST /detokenize and GET /tokenizer_info, as vLLM has them."""

from __future__ import annotations

from typing import Any

from pearl.errors import InvalidRequestError
from pearl.serving.protocol import DetokenizeRequest, TokenizeRequest
from pearl.serving.service import Service
from pearl.serving.texts import template_variables
from pearl.serving.tool_use import checked_tools, require_template


async def tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    service.admit(body)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("give a prompt, or messages", "prompt")
    if body.messages is not None:
        variables = template_variables(body)
        if tools := checked_tools(body.tools):
            require_template(tools, service.markup)
            variables["tools"] = tools
        ids = await service.texts.conversation_ids(body.messages, variables)
    else:
        ids = await service.texts.ids(body.prompt or "", body.add_special_tokens is not False)
    found: dict[str, Any] = {"count": len(ids), "max_model_len": service.engine.llm.max_model_len, "tokens": ids}
    if body.return_token_strs:
        tokenizer = service.engine.llm.tokenizer
        found["token_strs"] = [tokenizer.token_bytes(token).decode(errors="replace") for token in ids]
    return found


async def detokenize(service: Service, body: DetokenizeRequest) -> dict[str, str]:
    service.admit(body)
    return {"prompt": await service.texts.decode(body.tokens)}


async def tokenizer_info(service: Service) -> dict[str, Any]:
    return await service.texts.settings()

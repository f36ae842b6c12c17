"""What users bring as chat messages, as conversations that a chat template can render."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pearl.errors import InvalidRequestError
from pearl.user_values import shown

Message = Mapping[str, Any]

_CALL_WANTED = 'a call is such as {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}'
_WANTED = 'a conversation is a list of messages such as {"role": "user", "content": "Hello"}'


def read_conversations(given: Any) -> list[list[dict[str, Any]]]:
    """One conversation, or a list of them. Raises InvalidRequestError; which roles there are is the template's matter.

    Content is a text, or a list of text parts ({"type": "text", "text": ...}), which become lines. Calls of tools are
    as OpenAI has them; their arguments, a JSON object in a text, become a mapping, as templates expect. What is null is
    left out, and so is an empty list of calls; a tool's result gets the tool's name. Whatever else a message holds is
    handed on to the template.
    """
    if not _is_list(given):
        raise InvalidRequestError(f"{_WANTED}, not {shown(given)}")
    if given and _is_list(given[0]):
        return [_conversation(messages, f"messages[{index}]") for index, messages in enumerate(given)]
    return [_conversation(given, "messages")]


def read_conversation(given: Any) -> list[dict[str, Any]]:
    """Likewise, where exactly one is wanted."""
    conversations = read_conversations(given)
    if len(conversations) != 1:
        raise InvalidRequestError(
            f"one conversation is wanted here, these are {len(conversations)}; llm.chat takes several"
        )
    return conversations[0]


def _conversation(given: Any, name: str) -> list[dict[str, Any]]:
    if not _is_list(given):
        raise InvalidRequestError(f"{_WANTED}; {name} is {shown(given)}")
    if not given:
        raise InvalidRequestError(f"{name} is empty; {_WANTED}")
    messages = [_message(message, f"{name}[{index}]") for index, message in enumerate(given)]
    _name_results(messages)
    return messages


def _name_results(messages: Sequence[dict[str, Any]]) -> None:
    """A tool's result says which call it is of; some templates, such as Hermes', want the tool's name."""
    names: dict[str, str] = {}
    for message in messages:
        for call in message.get("tool_calls", ()):
            names[call.get("id", "")] = call["function"]["name"]
        if message["role"] == "tool" and "name" not in message and message.get("tool_call_id") in names:
            message["name"] = names[message["tool_call_id"]]


def _message(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"{_WANTED}; {name} is {shown(given)}")
    message = {key: value for key, value in given.items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise InvalidRequestError(f'{name} has no "role" that is a text; {_WANTED}')
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    for key in ("tool_call_id", "reasoning_content"):
        if not isinstance(message.get(key, ""), str):
            raise InvalidRequestError(f"{name}.{key} is no text, but {shown(message[key])}")
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], f"{name}.tool_calls")
    content: Any = message.get("content")
    if content is None and ("tool_calls" in message or message.get("reasoning_content")):
        content = ""  # templates print it, and print None as a word
    if _is_list(content):
        content = "\n".join(_text_of_part(part, f"{name}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise InvalidRequestError(f'{name} has no "content" that is a text; {_WANTED}')
    return message | {"content": content}


def _calls(given: Any, name: str) -> list[dict[str, Any]]:
    if not _is_list(given):
        raise InvalidRequestError(f"{name} is no list, but {shown(given)}; {_CALL_WANTED}")
    return [_call(call, f"{name}[{index}]") for index, call in enumerate(given)]


def _call(given: Any, name: str) -> dict[str, Any]:
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequestError(f"{name} has no function with a name; {_CALL_WANTED}")
    if given.get("type", "function") != "function" or not isinstance(given.get("id", ""), str):
        raise InvalidRequestError(f"{name} is of another type, or its id is no text; {_CALL_WANTED}")
    arguments = function.get("arguments")
    if not isinstance(arguments, str | Mapping | None):
        raise InvalidRequestError(f"{name}.function.arguments is {shown(arguments)}; {_CALL_WANTED}")
    return {**given, "type": "function", "function": {**function, "arguments": _arguments(arguments)}}


def _arguments(given: str | Mapping[str, Any] | None) -> Any:
    """A text that is no JSON object is what a model wrote: the template's matter."""
    if not given:
        return {}
    if isinstance(given, Mapping):
        return given
    try:
        read = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return read if isinstance(read, dict) else given


def _text_of_part(part: Any, name: str) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, Mapping) else part
    raise InvalidRequestError(
        f'{name} is no text ({shown(kind)}); the engine reads {{"type": "text", "text": ...}} only'
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))

"""What users bring as chat messages, as conversations that a chat template can render."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pearl.errors import InvalidRequestError
from pearl.user_values import shown

Message = Mapping[str, Any]

_WANTED = 'a conversation is a list of messages such as {"role": "user", "content": "Hello"}'


def read_conversations(given: Any) -> list[list[dict[str, Any]]]:
    """One conversation, or a list of them. Raises InvalidRequestError; which roles there are is the template's matter.

    Content is a text, or a list of text parts ({"type": "text", "text": ...}), which become lines. Whatever else a
    message holds (name, tool_calls, ...) is handed on to the template.
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
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(given)]


def _message(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"{_WANTED}; {name} is {shown(given)}")
    message = dict(given)
    if not isinstance(message.get("role"), str):
        raise InvalidRequestError(f'{name} has no "role" that is a text; {_WANTED}')
    content: Any = message.get("content")
    if content is None and message.get("tool_calls"):
        return message
    if _is_list(content):
        content = "\n".join(_text_of_part(part, f"{name}.content[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise InvalidRequestError(f'{name} has no "content" that is a text; {_WANTED}')
    return message | {"content": content}


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

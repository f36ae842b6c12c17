"""What the served model's chats have beside plain text: tools, and reasoning. Found in its template and vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pearl.errors import InvalidRequestError
from pearl.models import Tokenizer
from pearl.serving.reasoning import THINK, THINK_END
from pearl.serving.tool_formats import FORMATS, ToolFormat, format_of_template

ToolParserName = Literal["auto", "hermes", "llama3_json", "none"]
ReasoningParserName = Literal["auto", "think", "none"]
_PROBE = "pearl_probe_tool"
_HELLO = {"role": "user", "content": "Hello"}


class ChatMarkup:
    """Found when it is first asked for: that renders a conversation, which takes seconds the first time."""

    def __init__(
        self, tokenizer: Tokenizer, tool_parser: ToolParserName = "auto", reasoning_parser: ReasoningParserName = "auto"
    ) -> None:
        self._tokenizer, self._tool_parser, self._reasoning_parser = tokenizer, tool_parser, reasoning_parser

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the chat template does something with tools."""
        probe = {"type": "function", "function": {"name": _PROBE, "description": "", "parameters": _no_parameters()}}
        try:
            return _PROBE in self._tokenizer.chat_text([_HELLO], {"tools": [probe]})
        except InvalidRequestError:
            return False

    @cached_property
    def tool_format(self) -> ToolFormat | None:
        if self._tool_parser != "auto":
            return FORMATS.get(self._tool_parser)
        return format_of_template(self._template)

    @cached_property
    def has_reasoning(self) -> bool:
        if self._reasoning_parser != "auto":
            return self._reasoning_parser == "think"
        return THINK in self._template or THINK in self._tokenizer.vocabulary.tokens.values()

    def shown_tokens(self, with_tools: bool) -> frozenset[int]:
        """Special tokens that are tags of this markup: without their texts there would be nothing to read."""
        tags = {THINK, THINK_END} if self.has_reasoning else set()
        if with_tools and self.tool_format is not None:
            tags.update(self.tool_format.tags)
        return frozenset(token for token, text in self._tokenizer.special_texts.items() if text in tags)

    @cached_property
    def _template(self) -> str:
        found: str | Mapping[str, str] | None = self._tokenizer.settings()["chat_template"]
        return found or "" if isinstance(found, str | None) else "\n".join(found.values())

    def described(self) -> str:
        """For the log."""
        tools = self.tool_format.name if self.tool_format is not None and self.writes_tools else "none"
        return f"tools {tools}, reasoning {'think' if self.has_reasoning else 'none'}"


def _no_parameters() -> dict[str, Any]:
    return {"type": "object", "properties": {}}

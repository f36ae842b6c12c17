"""What the operator of a server decides."""

from __future__ import annotations

from dataclasses import dataclass

from pearl.serving.chat_markup import ReasoningParserName, ToolParserName

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class ServerSettings:
    """``names``: of the model, all of which requests may use; answers name the first.

    ``api_key``: None lets everyone in. ``origins``: web pages that may ask, for CORS; none by default.
    ``tool_parser``, ``reasoning_parser``: how the model writes calls of tools, and what it thinks; "auto": as its chat
    template and vocabulary have it. ``replica``: which one this is, the label ``engine`` of its metrics.
    """

    names: tuple[str, ...]
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    max_body: int = 16 * MEBIBYTE
    tool_parser: ToolParserName = "auto"
    reasoning_parser: ReasoningParserName = "auto"
    replica: str = "0"

    @property
    def name(self) -> str:
        return self.names[0]

"""From an output's text to a message of a chat: reasoning, content and calls of tools, whole or piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import uuid4

from pearl.serving.reasoning import ReasoningSplitter, Split
from pearl.serving.tool_parser import CallBegins, Content, Event, ToolCallParser


class CallPiece(NamedTuple):
    """``id`` and ``name`` are given with the first piece of a call."""

    number: int  # from 0 on
    id: str | None
    name: str | None
    arguments: str

    def as_delta(self) -> dict[str, Any]:
        if self.id is None:
            return {"index": self.number, "function": {"arguments": self.arguments}}
        return {"index": self.number} | self.as_call()

    def as_call(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass
class Piece:
    """What a piece of text adds to the message; of one call there is one entry."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)

    def followed_by(self, other: Piece) -> Piece:
        """``other`` begins no call and goes on with none: what was held back."""
        return Piece(self.reasoning + other.reasoning, self.content + other.content, self.calls)

    def deltas(self) -> list[dict[str, Any]]:
        """Each of one kind: many clients look no further than the first that they find."""
        calls = [call.as_delta() for call in self.calls]
        parts = {"reasoning_content": self.reasoning, "content": self.content, "tool_calls": calls}
        return [{name: part} for name, part in parts.items() if part]


class MessageParser:
    """Of one output. ``one_call``: what is called after the first is left out."""

    def __init__(
        self, reasoning: ReasoningSplitter | None, tools: ToolCallParser | None, one_call: bool = False
    ) -> None:
        self._reasoning, self._tools, self._one_call = reasoning, tools, one_call
        self._calls = 0  # that have begun

    def feed(self, text: str) -> Piece:
        piece = Piece()
        self._read(piece, Split("", text) if self._reasoning is None else self._reasoning.feed(text))
        return piece

    def finish(self) -> Piece:
        """What was held back, at the end of the text."""
        piece = Piece()
        if self._reasoning is not None:
            self._read(piece, self._reasoning.finish())
        if self._tools is not None:
            self._add(piece, self._tools.finish())
        return piece

    def whole(self, text: str) -> dict[str, Any]:
        """The message of a text that is complete, without its role."""
        piece = self.feed(text)
        piece = piece.followed_by(self.finish())
        message: dict[str, Any] = {"content": piece.content}
        if not piece.content and (piece.calls or self.is_reasoning):
            message["content"] = None
        if self._reasoning is not None:
            message["reasoning_content"] = piece.reasoning or None
        if piece.calls:
            message["tool_calls"] = [call.as_call() for call in piece.calls]
        return message

    @property
    def is_reasoning(self) -> bool:
        return self._reasoning is not None and self._reasoning.inside

    @property
    def has_called(self) -> bool:
        """Whether there are calls, and all are complete."""
        return self._tools is not None and self._calls > 0 and (self._is_left_out or not self._tools.is_open)

    def _read(self, piece: Piece, split: Split) -> None:
        piece.reasoning += split.reasoning
        if self._tools is None:
            piece.content += split.answer
        elif split.answer:
            self._add(piece, self._tools.feed(split.answer))

    def _add(self, piece: Piece, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Content):
                piece.content += event.text
            elif isinstance(event, CallBegins):
                self._calls += 1
                if not self._is_left_out:
                    piece.calls.append(CallPiece(self._calls - 1, f"call_{uuid4().hex[:24]}", event.name, ""))
            elif self._is_left_out:
                continue
            elif piece.calls and piece.calls[-1].number == self._calls - 1:
                latest = piece.calls[-1]
                piece.calls[-1] = latest._replace(arguments=latest.arguments + event.text)
            else:
                piece.calls.append(CallPiece(self._calls - 1, None, None, event.text))

    @property
    def _is_left_out(self) -> bool:
        return self._one_call and self._calls > 1

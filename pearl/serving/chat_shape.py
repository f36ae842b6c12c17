"""The objects of /v1/chat/completions: messages, and their deltas."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pearl.models import Tokenizer
from pearl.outputs import CompletionOutput, StreamChunk
from pearl.serving.answers import Piece
from pearl.serving.event_stream import as_json
from pearl.serving.generation import Generation
from pearl.serving.logprobs import chat_logprobs
from pearl.serving.message_parser import MessageParser
from pearl.serving.reasoning import ReasoningSplitter, ReasoningTokens
from pearl.serving.tool_parser import ToolCallParser
from pearl.serving.tool_use import ToolUse


@dataclass(frozen=True)
class Markup:
    """What the answers of a request may hold beside plain text.

    ``opened``: the prompt ends inside reasoning. ``shown``: special tokens whose names are part of the text.
    """

    tools: ToolUse | None
    reasoning: bool
    opened: bool
    shown: Collection[int]

    @property
    def is_plain(self) -> bool:
        return self.tools is None and not self.reasoning


class ChatShape:
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    of_one_prompt = True

    def __init__(self, tokenizer: Tokenizer, logprobs: bool, markup: Markup, generation: Generation) -> None:
        self._tokenizer, self._logprobs, self._markup, self._generation = tokenizer, logprobs, markup, generation
        self._readers: dict[int, _Reader] = {}  # by output

    def choice(self, output: CompletionOutput) -> dict[str, Any]:
        reason: str | None = output.finish_reason
        if self._markup.is_plain:
            message: dict[str, Any] = {"content": output.text}
        else:
            reader = self._reader(output.index)
            message = reader.parser.whole(output.text)
            reader.count(output)
            reason = reader.finish_reason(output)
        return {"message": {"role": "assistant"} | message, "logprobs": self._of(output), "finish_reason": reason}

    def opening(self, index: int) -> str:
        return '"delta":{"role":"assistant","content":""},"logprobs":null'

    def piece(self, chunk: StreamChunk) -> Piece:
        logprobs = as_json(self._of(chunk)) if self._logprobs else "null"
        if not self._markup.is_plain:
            return self._parsed(chunk, logprobs)
        delta = f'{{"content":{as_json(chunk.text)}}}' if chunk.text else "{}"
        return Piece(f'"delta":{delta},"logprobs":{logprobs}', bool(chunk.text), chunk.finish_reason)

    def _parsed(self, chunk: StreamChunk, logprobs: str) -> Piece:
        reader = self._reader(chunk.index)
        piece = reader.parser.feed(chunk.text)
        if chunk.finish_reason is not None:
            piece = piece.followed_by(reader.parser.finish())
        reader.count(chunk)
        *earlier, last = piece.deltas() or [{}]
        members = f'"delta":{as_json(last)},"logprobs":{logprobs}'
        before = [f'"delta":{as_json(delta)},"logprobs":null' for delta in earlier]
        return Piece(members, bool(piece), reader.finish_reason(chunk), before)

    def reasoning_tokens(self) -> int | None:
        return sum(reader.reasoning_tokens for reader in self._readers.values()) if self._markup.reasoning else None

    def _reader(self, index: int) -> _Reader:
        if index not in self._readers:
            detokenizer = self._tokenizer.detokenizer(self._generation.prompt_of(index), self._markup.shown)
            self._readers[index] = _Reader(self._markup, ReasoningTokens(detokenizer))
        return self._readers[index]

    def _of(self, part: CompletionOutput | StreamChunk) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, part.token_ids, part.logprobs or ()) if self._logprobs else None


class _Reader:
    """Of one output."""

    def __init__(self, markup: Markup, tokens: ReasoningTokens) -> None:
        tools = markup.tools
        self._splitter = ReasoningSplitter(markup.opened) if markup.reasoning else None
        calls = None if tools is None else ToolCallParser(tools.form, tools.names, tools.schema is not None)
        self.parser = MessageParser(self._splitter, calls, tools is not None and tools.one_call)
        self._tokens = tokens

    def count(self, part: CompletionOutput | StreamChunk) -> None:
        """To be called when the parser has the part's text."""
        if self._splitter is not None:
            self._tokens.feed(part.token_ids, self._splitter)

    @property
    def reasoning_tokens(self) -> int:
        return self._tokens.count

    def finish_reason(self, part: CompletionOutput | StreamChunk) -> str | None:
        return "tool_calls" if part.finish_reason == "stop" and self.parser.has_called else part.finish_reason

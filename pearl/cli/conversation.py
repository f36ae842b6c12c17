"""A conversation, and how it fits into the context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pearl.errors import InvalidRequestError

Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str


@dataclass(frozen=True)
class RenderedPrompt:
    token_ids: list[int]
    dropped: int  # oldest turns that no longer fit and were forgotten for this prompt


class Conversation:
    """System message and turns; the oldest turns are forgotten when the context is full.

    render: messages to token ids, by the model's chat template, ending where the assistant's answer begins.
    limit: most tokens a prompt may have, so that an answer still fits behind it.
    """

    def __init__(self, render: Callable[[list[Message]], list[int]], limit: int, system: str | None = None) -> None:
        self._render, self._limit, self._system = render, limit, system
        self.turns: list[Turn] = []

    def ask(self, question: str) -> RenderedPrompt:
        """The prompt for the next answer.

        Raises InvalidRequestError if the question does not fit even alone; the conversation is then as before.
        """
        for dropped in range(len(self.turns) + 1):
            token_ids = self._render(self._messages(self.turns[dropped:], question))
            if len(token_ids) <= self._limit:
                del self.turns[:dropped]
                return RenderedPrompt(token_ids, dropped)
        raise InvalidRequestError(
            f"the message alone makes a prompt of {len(token_ids)} tokens, at most {self._limit} leave room for an "
            "answer; shorten it"
        )

    def add(self, question: str, answer: str) -> None:
        self.turns.append(Turn(question, answer))

    def reset(self) -> None:
        """Forget every turn; the system message stays."""
        self.turns.clear()

    def _messages(self, turns: list[Turn], question: str) -> list[Message]:
        messages: list[Message] = [] if self._system is None else [{"role": "system", "content": self._system}]
        for turn in turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return [*messages, {"role": "user", "content": question}]

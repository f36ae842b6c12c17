"""The oldest turns are forgotten when the context is full. One character is one token here."""

from __future__ import annotations

import pytest

from pearl import InvalidRequestError
from pearl.cli.conversation import Conversation, Message


def render(messages: list[Message]) -> list[int]:
    return [ord(character) for message in messages for character in message["role"][0] + message["content"]]


def text(token_ids: list[int]) -> str:
    return "".join(map(chr, token_ids))


def test_messages_alternate_after_the_system_message() -> None:
    conversation = Conversation(render, 100, system="!")
    conversation.add("1", "2")
    assert text(conversation.ask("3").token_ids) == "s!u1a2u3"


def test_oldest_turns_are_forgotten() -> None:
    conversation = Conversation(render, 10, system="!")
    for turn in range(3):
        conversation.add(str(turn), str(turn))
    prompt = conversation.ask("?")
    assert (text(prompt.token_ids), prompt.dropped) == ("s!u2a2u?", 2)
    assert [turn.question for turn in conversation.turns] == ["2"]


def test_a_message_that_is_too_long_changes_nothing() -> None:
    conversation = Conversation(render, 10)
    conversation.add("1", "2")
    with pytest.raises(InvalidRequestError, match="13 tokens, at most 10"):
        conversation.ask("x" * 12)
    assert len(conversation.turns) == 1


def test_reset_keeps_the_system_message() -> None:
    conversation = Conversation(render, 100, system="!")
    conversation.add("1", "2")
    conversation.reset()
    assert text(conversation.ask("3").token_ids) == "s!u3"

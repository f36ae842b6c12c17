"""What clients ask, and whether what they get is right."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.serving_load.client import Connection, Reply
from bench.shared.server import Server
from pearl.errors import RoundError

PATH = "/v1/completions"
_PATIENCE = 120.0  # seconds for an answer of a server that has nothing else to do


@dataclass(frozen=True)
class Question:
    """A prompt with its parameters, which settle the answer: greedy, or with a seed."""

    number: int
    body: Mapping[str, Any]

    @classmethod
    def of(cls, number: int, prompt: str, max_tokens: int, **params: Any) -> Question:
        """Token ids come with the text, so that every token is counted and compared."""
        settled = {"temperature": 0, "ignore_eos": True, "stream": True, "return_token_ids": True, **params}
        return cls(number, {"prompt": prompt, "max_tokens": max_tokens, **settled})


Answers = Mapping[int, list[int]]  # token ids by a question's number


async def answers(server: Server, questions: Sequence[Question]) -> dict[int, list[int]]:
    """Of a server that has nothing else to do, one after the other. RoundError if it gives one up."""
    connection = Connection(server.host, server.port)
    found = {}
    for question in questions:
        try:
            reply = await asyncio.wait_for(connection.ask(PATH, question.body), _PATIENCE)
        except asyncio.TimeoutError as error:
            raise RoundError(f"a server without load does not answer within {_PATIENCE:g} s") from error
        if reply.error is not None:
            raise RoundError(f"a server without load does not answer: {reply.error}")
        found[question.number] = tokens_of(reply)
    connection.cut()
    return found


def tokens_of(reply: Reply) -> list[int]:
    return [token for _, ids in reply.pieces() for token in ids]


def is_right(reply: Reply, expected: Sequence[int]) -> bool:
    """What came of an answer that nobody waited for must be the beginning of the right one."""
    got = tokens_of(reply)
    return got == list(expected) if reply.done else got == list(expected[: len(got)])

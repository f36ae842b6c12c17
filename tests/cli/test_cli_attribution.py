"""Streamed text is cut by the token it came from, and never changed."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from cli_support import PROMPT

from pearl import LLM, RequestMetrics, SamplingParams, StreamChunk
from pearl.attribution import Attribution


def chunk(text: str, token_ids: Sequence[int] = (), drafted: Sequence[bool] = ()) -> StreamChunk:
    return StreamChunk(0, text, tuple(token_ids), tuple(drafted), None, RequestMetrics())


@pytest.fixture
def attribution(llm: LLM) -> Attribution:
    return Attribution(llm.tokenizer.detokenizer(llm.encode(PROMPT)))


@pytest.mark.parametrize("stop", [None, "return", "self"])
def test_pieces_join_to_the_streamed_text(llm: LLM, attribution: Attribution, stop: str | None) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, stop=stop)
    text, pieces = "", []
    for part in llm.stream(PROMPT, params):
        text += part.text
        pieces += attribution.split(part)
    assert "".join(piece for piece, _ in pieces) == text
    assert {drafted for _, drafted in pieces} == {False, True}


def test_each_token_keeps_its_origin(llm: LLM, attribution: Attribution) -> None:
    first, second = llm.encode("return"), llm.encode(" None")
    part = chunk("return None", [*first, *second], [True] * len(first) + [False] * len(second))
    assert list(attribution.split(part)) == [("return", True), (" None", False)]


def test_text_that_was_held_back_keeps_its_origin(llm: LLM, attribution: Attribution) -> None:
    first, second = llm.encode("return"), llm.encode(" None")
    assert list(attribution.split(chunk("re", first, [True] * len(first)))) == [("re", True)]
    late = chunk("turn None", second, [False] * len(second))
    assert list(attribution.split(late)) == [("turn", True), (" None", False)]


def test_a_character_of_several_tokens_belongs_to_the_last(llm: LLM, attribution: Attribution) -> None:
    tokens = llm.encode("\N{SNOWMAN}")
    assert len(tokens) > 1
    drafted = [True] * (len(tokens) - 1) + [False]
    assert list(attribution.split(chunk("\N{SNOWMAN}", tokens, drafted))) == [("\N{SNOWMAN}", False)]


def test_text_that_no_token_gave_belongs_to_the_last(llm: LLM, attribution: Attribution) -> None:
    half = llm.encode("\N{SNOWMAN}")[:1]
    assert list(attribution.split(chunk("\N{REPLACEMENT CHARACTER}", half, [True]))) == [
        ("\N{REPLACEMENT CHARACTER}", True)
    ]

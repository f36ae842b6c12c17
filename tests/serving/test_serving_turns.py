"""Conversations of several turns on a live server: what both models have computed of a turn is used in the next."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from serving_support import OPTIONS, PROMPT, LiveServer

from pearl import LLM, SamplingParams

QUESTION = {"role": "user", "content": PROMPT + "    with open(path) as file:"}
NEXT = {"role": "user", "content": "def write_lines(path, lines):"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def fresh() -> Iterator[LLM]:
    """Finds nothing of what came before."""
    with LLM(**OPTIONS, prefix_caching=False) as loaded:
        yield loaded


def hits(server: LiveServer) -> tuple[int, int]:
    """Tokens that target and draft have found in their caches, ever."""
    scheduler = server.engine.llm.engine.scheduler
    assert scheduler.draft_kv is not None
    return scheduler.target_kv.stats.hit_tokens, scheduler.draft_kv.stats.hit_tokens


@pytest.mark.parametrize("params", [{"temperature": 0}, {"temperature": 0.9, "seed": 5}])
def test_a_turn_finds_what_both_models_computed_in_the_last(
    server: LiveServer, fresh: LLM, params: dict[str, Any]
) -> None:
    messages: list[Any] = [QUESTION]
    sampling = SamplingParams(max_tokens=60, **params)
    known: list[int] = []
    last_prompt = 0
    for turn in range(3):
        before = hits(server)
        answer = server.post(CHAT, messages=messages, max_tokens=60, return_token_ids=True, **params).json()
        choice, usage = answer["choices"][0], answer["usage"]
        (expected,) = fresh.chat(messages, sampling)
        assert choice["token_ids"] == expected.outputs[0].token_ids
        assert choice["message"]["content"] == expected.outputs[0].text
        prompt = choice["prompt_token_ids"]
        common = next((i for i, (a, b) in enumerate(zip(known, prompt, strict=False)) if a != b), len(known))
        if turn:
            page = server.engine.llm.config.page_size
            usable = min(common, len(known) - 1) // page * page  # of an output's last token nothing is computed
            assert usable > last_prompt
            assert usage["prompt_tokens_details"] == {"cached_tokens": usable}
            assert [after - count for after, count in zip(hits(server), before, strict=True)] == [usable, usable]
        known, last_prompt = prompt + choice["token_ids"], len(prompt)
        messages = [*messages, choice["message"], NEXT]


def test_special_tokens_show_where_they_are_asked_for(server: LiveServer) -> None:
    """As tags of a model's markup; then they are text like any other."""
    end = "<|endoftext|>"

    async def texts() -> list[str]:
        found = []
        for stop, shown in ((None, ()), (None, (0,)), (end, (0,)), (f"{end}x", (0,)), (f"x{end}", ())):
            params = SamplingParams(max_tokens=3, logit_bias={0: 1000.0}, ignore_eos=True, stop=stop)
            stream = server.engine.submit(server.engine.llm.encode(PROMPT), params, shown=shown)
            found.append("".join([chunk.text async for chunk in stream]))
        return found

    assert asyncio.run(texts()) == ["", end * 3, "", end * 3, ""]

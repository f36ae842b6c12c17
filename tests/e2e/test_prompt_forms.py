"""Prompts as transformers makes them, and chats: the output is what transformers gives for the same ids."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e_support import Pair, assert_at_rest, token_ids
from transformers import AutoTokenizer

from pearl import LLM, InvalidRequestError, SamplingParams

OpenLLM = Callable[..., LLM]
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)
TEXTS = ["def f(x):\n", "import os"]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'pirate' %}{{ raise_exception('no pirates') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n"
    "{% endfor %}"
    "{% if terse %}tersely {% endif %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]
OTHER = [{"role": "user", "content": "And a set?"}]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "pt", "np"])
def test_a_tokenizers_padded_batch_is_its_texts(llama: Pair, open_llm: OpenLLM, side: str, tensors: Any) -> None:
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.padding_side = side
    batch = tokenizer(TEXTS, padding=True, return_tensors=tensors)
    assert len(set(map(len, batch["input_ids"]))) == 1
    llm = open_llm(llama, window=3)
    expected = [llama.greedy(tokenizer.encode(text), 8) for text in TEXTS]
    assert token_ids(llm.generate(batch, PARAMS)) == expected
    assert token_ids(llm.generate(TEXTS, PARAMS)) == expected
    one = tokenizer(TEXTS[0], return_tensors=tensors)
    assert [t for chunk in llm.stream(one, PARAMS) for t in chunk.token_ids] == expected[0]


def test_outputs_carry_the_text_that_was_brought(llama: Pair, open_llm: OpenLLM) -> None:
    ids = llama.tokenizer.encode(TEXTS[1])
    brought = [TEXTS[0], {"prompt": TEXTS[1], "prompt_token_ids": ids}, np.array(ids)]
    outputs = open_llm(llama, window=3).generate(brought, PARAMS)
    assert [output.prompt for output in outputs] == [*TEXTS, None]
    assert outputs[1].prompt_token_ids == outputs[2].prompt_token_ids == ids


@pytest.fixture
def talker(llama: Pair, tmp_path: Path, open_llm: OpenLLM) -> LLM:
    """The pair with a chat template."""
    folder = tmp_path / "talker"
    shutil.copytree(llama.target, folder)
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return open_llm(llama, target=folder, window=3)


def rendered(llm: LLM, messages: Any, **variables: Any) -> list[int]:
    """By transformers."""
    tokenizer = AutoTokenizer.from_pretrained(llm.config.target)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **variables)["input_ids"]


def test_a_chat_continues_what_transformers_renders(llama: Pair, talker: LLM) -> None:
    expected = [llama.greedy(rendered(talker, messages), 8) for messages in (CHAT, OTHER)]
    assert expected[0] != expected[1]
    assert token_ids(talker.chat(CHAT, PARAMS)) == expected[:1]
    assert token_ids(talker.chat([CHAT, OTHER], [PARAMS, PARAMS])) == expected
    parts = [CHAT[0], {"role": "user", "content": [{"type": "text", "text": CHAT[1]["content"]}]}]
    assert [t for chunk in talker.stream_chat(parts, PARAMS) for t in chunk.token_ids] == expected[0]
    (output,) = talker.chat(OTHER, PARAMS, chat_template_kwargs={"terse": True})
    assert output.prompt_token_ids == rendered(talker, OTHER, terse=True)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{"role": "pirate", "content": "Arr"}], "the chat template refuses these messages: no pirates"),
        ([{"role": "user", "content": "a\ud800"}], "half a character"),
        ([{"role": "us\ud800er", "content": "a"}], "half a character"),
        ("Hello", "a conversation is a list of messages"),
        ([CHAT, [{"role": "user"}]], r'messages\[1\]\[0\] has no "content"'),
    ],
)
def test_bad_messages_are_refused_before_any_work(talker: LLM, messages: Any, says: str) -> None:
    for chat in (talker.chat, talker.stream_chat):
        if chat is talker.chat or not isinstance(messages[0], list):
            with pytest.raises(InvalidRequestError, match=says):
                chat(messages, PARAMS)
    assert_at_rest(talker)


def test_a_model_without_template_and_a_prompt_of_messages_say_so(llama: Pair, open_llm: OpenLLM) -> None:
    llm = open_llm(llama, window=3)
    with pytest.raises(InvalidRequestError, match="no chat template"):
        llm.chat(CHAT)
    for refuses in (llm.generate, llm.stream, llm.encode):
        with pytest.raises(InvalidRequestError, match=r"use llm\.chat\(messages\)"):
            refuses(CHAT)
    with pytest.raises(InvalidRequestError, match="one prompt is wanted here, these are 2"):
        llm.stream(TEXTS)
    with pytest.raises(InvalidRequestError, match=r"SamplingParams\.from_mapping"):
        llm.generate("a", {"temperature": 1.0})  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="on_output must be a function, not False"):
        llm.generate("a", PARAMS, False)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="1 prompt but 2"):
        llm.stream("a", [PARAMS, PARAMS])  # type: ignore[arg-type]
    assert_at_rest(llm)

"""Ids where tokenizer and head do not end at the same place: who names one that is none is refused alone, before it
runs; what transformers gives, or ends with, is given.

Three targets share weights with 320 rows: their tokenizers know more tokens than that, have a gap, or are smaller.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from e2e_support import (
    FAMILIES,
    assert_at_rest,
    byte_tokenizer,
    greedy_reference,
    perturbed,
    random_model,
    save,
)
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from pearl import LLM, SamplingParams
from pearl.errors import InvalidRequestError

OpenLLM = Callable[..., LLM]
ROWS, CORE, TOKENS = 320, 290, 24
FIM = ["<PRE>", "<SUF>", "<MID>"]
PROMPT = [40, 7, 222, 9]
CONFIG = LlamaConfig(**{**FAMILIES["llama"].to_dict(), "vocab_size": ROWS})
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}<MID>"


def tokenizer_with(tokens: Mapping[int, str], **special: str) -> PreTrainedTokenizerFast:
    """Of CORE byte-level tokens, with more special ones at these ids."""
    state = json.loads(byte_tokenizer(CORE).backend_tokenizer.to_str())
    state["model"]["vocab"] |= {token: i for i, token in tokens.items()}
    backend = Tokenizer.from_str(json.dumps(state))
    backend.add_special_tokens(list(tokens.values()))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "<|endoftext|>", **special})


@pytest.fixture(scope="module")
def judge() -> PreTrainedModel:
    return random_model(CONFIG, seed=1)


@pytest.fixture(scope="module")
def draft(judge: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(perturbed(judge, 0.03), byte_tokenizer(CORE), tmp_path_factory.mktemp("draft"))


@pytest.fixture
def target(judge: PreTrainedModel, tmp_path: Path) -> Callable[..., str]:
    """``target(tokenizer, **generation)``: a folder with the judge's weights."""
    return lambda tokenizer, **generation: save(judge, tokenizer, tmp_path / "target", **generation)


def reference(judge: PreTrainedModel, usable: int, **options: Any) -> list[int]:
    padding = list(range(usable, ROWS)) or None
    return greedy_reference(judge, PROMPT, TOKENS, suppress_tokens=padding, **options).tokens


@pytest.fixture(scope="module")
def late_end(judge: PreTrainedModel) -> tuple[int, list[int]]:
    """An id past the core that greedy decoding comes to, if it may take ids up to it; and what it says until then."""
    for token in range(CORE + 10, ROWS):
        tokens = reference(judge, token + 1)
        if token in tokens[3:] and token not in tokens[:3]:
            return token, reference(judge, token + 1, eos_token_id=token)
    raise AssertionError("choose another seed")


@pytest.fixture
def behind(target: Callable[..., str], draft: str, open_llm: OpenLLM) -> LLM:
    """Like CodeLlama 34B: three tokens lie behind the head."""
    path = target(tokenizer_with({ROWS + i: token for i, token in enumerate(FIM)}))
    llm = open_llm(target=path, draft=draft, dtype="float32", window=3)
    llm.tokenizer._tokenizer.chat_template = TEMPLATE
    return llm


def test_tokens_behind_the_head_are_refused_for_their_request_alone(judge: PreTrainedModel, behind: LLM) -> None:
    params, plain = SamplingParams(max_tokens=TOKENS, ignore_eos=True), reference(judge, ROWS)
    assert len(plain) == TOKENS
    stream = behind.stream(PROMPT, params)
    tokens = list(next(stream).token_ids)
    named = r"token 322 \('<MID>'\), outside the vocabulary \[0, 320\): the model has no row for it"
    chat = behind.tokenizer.render_chat([{"role": "user", "content": "a"}])
    for prompt in ("a<MID>", [1, 322], chat):
        for ask in (lambda p: behind.generate([PROMPT, p], params), lambda p: behind.stream(p, params)):
            with pytest.raises(InvalidRequestError, match=f"the prompt has {named}"):
                ask(prompt)
    for values in ({"logit_bias": {322: 1.0}}, {"stop_token_ids": [322]}):
        with pytest.raises(InvalidRequestError, match=f"{next(iter(values))} names {named}"):
            behind.generate([PROMPT], SamplingParams(**values))
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tokens == plain
    assert_at_rest(behind)


def test_the_last_row_may_be_named_and_drawn(behind: LLM) -> None:
    params = SamplingParams(max_tokens=3, logit_bias={ROWS - 1: 100.0}, logprobs=20, ignore_eos=True)
    output = behind.generate([[ROWS - 1, 3]], params)[0].outputs[0]
    assert output.token_ids == [ROWS - 1] * 3
    assert output.logprobs
    assert all(0 <= token < ROWS for place in output.logprobs for token, _ in place.top)


@pytest.mark.parametrize("eos_ids", [[0, 322], [0, -1]], ids=str)
def test_an_end_that_the_model_has_no_row_for_never_comes(
    judge: PreTrainedModel, target: Callable[..., str], draft: str, open_llm: OpenLLM, eos_ids: list[int]
) -> None:
    """A minimum length forbids ends of text: neither an id past the row nor a last column by the name of -1."""
    path = target(tokenizer_with({ROWS + i: token for i, token in enumerate(FIM)}), eos_token_id=eos_ids)
    llm = open_llm(target=path, draft=draft, dtype="float32", window=3)
    expected = reference(judge, ROWS, min_new_tokens=TOKENS, eos_token_id=[0])
    output = llm.generate([PROMPT], SamplingParams(max_tokens=TOKENS, min_tokens=TOKENS))[0].outputs[0]
    assert output.token_ids == expected
    biased = SamplingParams(max_tokens=2, min_tokens=2, logit_bias={ROWS - 1: 100.0})
    assert llm.generate([PROMPT], biased)[0].outputs[0].token_ids == [ROWS - 1] * 2


@pytest.mark.parametrize("who", ["tokenizer", "generation_config.json"])
@pytest.mark.parametrize("setting", [{"method": "autoregressive"}, {"window": 3}], ids=str)
def test_an_end_of_text_above_a_gap_ends_it(
    late_end: tuple[int, list[int]],
    target: Callable[..., str],
    draft: str,
    open_llm: OpenLLM,
    who: str,
    setting: dict[str, Any],
) -> None:
    """Its id is larger than the number of tokens; and where only the configuration knows it, than any token's."""
    end, expected = late_end
    knows = {"eos_token": "<|im_end|>"} if who == "tokenizer" else {}
    tokenizer = tokenizer_with({end: "<|im_end|>"} if knows else {}, **knows)
    path = target(tokenizer, eos_token_id=end)
    assert len(AutoTokenizer.from_pretrained(path)) == CORE + bool(knows) < end
    output = (
        open_llm(target=path, draft=draft, dtype="float32", **setting)
        .generate([PROMPT], SamplingParams(max_tokens=TOKENS))[0]
        .outputs[0]
    )
    assert output.token_ids == expected
    assert output.finish_reason == "stop"
    assert output.text == tokenizer.decode(expected, skip_special_tokens=True)


def test_ids_in_a_gap_are_read_and_written(
    judge: PreTrainedModel, target: Callable[..., str], draft: str, open_llm: OpenLLM
) -> None:
    """The model has rows for them, as transformers finds; they have no text."""
    tokenizer = tokenizer_with({ROWS - 1: "<|im_end|>"})
    llm = open_llm(target=target(tokenizer), draft=draft, dtype="float32", window=2)
    prompt = [*PROMPT, CORE + 5, 8]
    expected = greedy_reference(judge, prompt, TOKENS, suppress_tokens=None).tokens
    assert any(CORE <= token < ROWS - 1 for token in expected)
    output = llm.generate([prompt], SamplingParams(max_tokens=TOKENS, ignore_eos=True))[0].outputs[0]
    assert output.token_ids == expected
    assert output.text == tokenizer.decode(expected, skip_special_tokens=True)

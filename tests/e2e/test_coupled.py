"""verification="coupled": whatever drafts, the output is seeded autoregressive decoding, token for token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from e2e_support import DRAFTING_SETTINGS, NGRAM_SETTINGS, Pair, acceptance, assert_at_rest, prompts, token_ids

from pearl import LLM, SamplingParams
from pearl_kernels import SamplingTensors
from pearl_kernels.reference import sample

OpenLLM = Callable[..., LLM]
TOKENS = 24
LENGTHS = (1, 4, 17, 40, 9, 25)
CUTOFFS: list[dict[str, Any]] = [
    {},
    {"top_k": 20},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01},
]


def requests(n: int = 1) -> list[SamplingParams]:
    """Every temperature with every cutoff, each with its own seed."""
    return [
        SamplingParams(temperature=t, seed=1000 * i + j, max_tokens=TOKENS, ignore_eos=True, n=n, **cutoff)
        for i, t in enumerate((0.5, 0.8, 1.0, 1.5))
        for j, cutoff in enumerate(CUTOFFS)
    ]


def batch_for(params: list[SamplingParams]) -> list[list[int]]:
    return prompts([LENGTHS[i % len(LENGTHS)] for i in range(len(params))], seed=21)


@pytest.fixture(scope="module")
def autoregressive(llama: Pair) -> list[list[int]]:
    """One request at a time, without drafts and without batching."""
    params = requests()
    with llama.llm(method="autoregressive", max_num_seqs=1) as llm:
        return token_ids(llm.generate(batch_for(params), params))


def test_seeded_autoregressive_decoding_is_what_the_reference_draws_from_transformers_logits(
    llama: Pair, autoregressive: list[list[int]]
) -> None:
    params = requests()
    for prompt, p, tokens in list(zip(batch_for(params), params, autoregressive, strict=True))[::3]:
        with torch.inference_mode():
            logits = llama.judge(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        rows = torch.arange(TOKENS)
        tensors = SamplingTensors(
            *(torch.full((TOKENS,), v) for v in (p.temperature, p.top_k, p.top_p, p.min_p)),
            seed=torch.full((TOKENS,), p.seed),
        )
        assert sample(logits, tensors, len(prompt) + rows, llama.judge.config.vocab_size).tokens.tolist() == tokens


@pytest.mark.parametrize("setting", {**DRAFTING_SETTINGS, **NGRAM_SETTINGS})
def test_equals_autoregressive_decoding(
    llama: Pair, open_llm: OpenLLM, autoregressive: list[list[int]], setting: str
) -> None:
    params = requests()
    options = {**DRAFTING_SETTINGS, **NGRAM_SETTINGS}[setting]
    llm = open_llm(llama, **options, verification="coupled", max_num_seqs=7, max_num_batched_tokens=32)
    outputs = llm.generate(batch_for(params), params)
    assert token_ids(outputs) == autoregressive
    if setting in DRAFTING_SETTINGS:
        assert 0.2 < acceptance(outputs) < 0.98
    assert_at_rest(llm)


@pytest.mark.parametrize("window", [1, 4])
def test_the_draft_does_not_matter(
    llama: Pair, open_llm: OpenLLM, unrelated_draft: str, autoregressive: list[list[int]], window: int
) -> None:
    params = requests()
    llm = open_llm(llama, draft=unrelated_draft, window=window, verification="coupled")
    outputs = llm.generate(batch_for(params), params)
    assert token_ids(outputs) == autoregressive
    assert 0 < acceptance(outputs) < 0.2  # the common noise alone makes even strangers agree now and then


@pytest.mark.parametrize("temperature", [0.0, 0.3, 2.0])
def test_the_drafts_temperature_does_not_matter(
    llama: Pair, open_llm: OpenLLM, autoregressive: list[list[int]], temperature: float
) -> None:
    params = requests()
    other = [SamplingParams(**{**vars(p), "draft_temperature": temperature}) for p in params]
    llm = open_llm(llama, window=3, verification="coupled")
    assert token_ids(llm.generate(batch_for(params), other)) == autoregressive


def test_the_batch_does_not_matter(llama: Pair, open_llm: OpenLLM, autoregressive: list[list[int]]) -> None:
    params = requests()
    llm = open_llm(llama, window=3, verification="coupled", max_num_seqs=16)
    everything = list(zip(batch_for(params), params, autoregressive, strict=True))
    for part in (everything[::-1], everything[::5], everything[3:4]):
        outputs = llm.generate([prompt for prompt, _, _ in part], [p for _, p, _ in part])
        assert token_ids(outputs) == [tokens for _, _, tokens in part]


@pytest.mark.parametrize("setting", ["pearl-1", "pearl-5", "speculative-3"])
def test_several_outputs_of_a_prompt(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    """Output i is the request with seed + i."""
    params = [SamplingParams(temperature=0.9, seed=50, max_tokens=TOKENS, ignore_eos=True, n=4)]
    single = [SamplingParams(temperature=0.9, seed=50 + i, max_tokens=TOKENS, ignore_eos=True) for i in range(4)]
    prompt = prompts([20], seed=22)[0]
    llm = open_llm(llama, **DRAFTING_SETTINGS[setting], verification="coupled")
    outputs = llm.generate([prompt], params)
    plain = open_llm(llama, method="autoregressive").generate([prompt] * 4, single)
    assert token_ids(outputs) == token_ids(plain)
    assert len({tuple(tokens) for tokens in token_ids(outputs)}) == 4


@pytest.mark.parametrize("setting", ["pearl-1", "pearl-3", "pearl-neither-4", "speculative-3"])
def test_penalties_and_minimum_length(pairs: dict[str, Pair], open_llm: OpenLLM, setting: str) -> None:
    pair, batch = pairs["qwen2"], prompts((3, 20, 33), seed=23)
    base = {"temperature": 0.8, "seed": 9, "max_tokens": TOKENS}
    params = [
        SamplingParams(**base, repetition_penalty=1.3, min_tokens=TOKENS, stop_token_ids=list(range(1, 100))),
        SamplingParams(**base, presence_penalty=1.0, frequency_penalty=0.7, ignore_eos=True),
        SamplingParams(**base, logit_bias={5: 4.0, 7: -100.0}, ignore_eos=True),
    ]
    plain = token_ids(open_llm(pair, method="autoregressive").generate(batch, params))
    outputs = open_llm(pair, **DRAFTING_SETTINGS[setting], verification="coupled").generate(batch, params)
    assert token_ids(outputs) == plain
    assert 0.2 < acceptance(outputs) < 0.98
    assert len(plain[0]) == TOKENS
    assert not set(plain[0][:-1]) & set(range(1, 100))
    assert 7 not in plain[2]

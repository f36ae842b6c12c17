"""Prepared windows with real forwards: random ones too, scarce pages, shared prefixes, ends; unused memory poisoned."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from e2e_support import PREPARED_SETTINGS, Pair, assert_at_rest, poison_ring, prompts, token_ids
from random_branches import RandomBranches

from pearl import LLM, SamplingParams

OpenLLM = Callable[..., LLM]
TOKENS = 24
GREEDY = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
SAMPLED = [
    SamplingParams(temperature=t, seed=i, max_tokens=TOKENS, ignore_eos=True, top_p=p)
    for i, (t, p) in enumerate([(0.7, 1.0), (1.0, 0.9), (1.3, 1.0), (0.9, 0.95)])
]


def poisoned(llm: LLM, seed: int | None = None) -> LLM:
    """NaN in all memory that a draft may read by mistake; with a seed branches are chosen at random."""
    runner = llm.engine.workers.drafter._runner  # type: ignore[union-attr]
    with torch.inference_mode():
        for tensor in chain.from_iterable(runner.cache.layers):
            tensor.fill_(torch.nan)
    poison_ring(llm)
    assert llm.engine.scheduler.branches is not None
    if seed is not None:
        llm.engine.scheduler.branches._choose = RandomBranches(seed)
    return llm


def hits(llm: LLM) -> int:
    assert llm.engine.scheduler.branches is not None
    return sum(llm.engine.scheduler.branches.counts.hits.values())


@pytest.mark.parametrize("setting", PREPARED_SETTINGS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_random_branches_change_nothing(pairs: dict[str, Pair], open_llm: OpenLLM, family: str, setting: str) -> None:
    pair, batch = pairs[family], prompts((1, 2, 15, 16, 17, 40))
    llm = poisoned(open_llm(pair, **PREPARED_SETTINGS[setting], max_num_seqs=4, max_num_batched_tokens=32), seed=0)
    assert token_ids(llm.generate(batch, GREEDY)) == [pair.greedy(prompt, TOKENS) for prompt in batch]
    assert_at_rest(llm)


@pytest.mark.parametrize("seed", [None, 1], ids=("likeliest", "random"))
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_sampled_outputs_are_those_without(llama: Pair, open_llm: OpenLLM, verification: str, seed: int | None) -> None:
    batch = prompts((3, 18, 40, 9), seed=31)
    plain = open_llm(llama, window=3, verification=verification).generate(batch, SAMPLED)
    llm = poisoned(open_llm(llama, window=4, verification=verification, prepared_windows=6), seed)
    assert token_ids(llm.generate(batch, SAMPLED)) == token_ids(plain)
    assert hits(llm) > 0
    assert_at_rest(llm)


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 8}, {}], ids=str)
def test_branches_give_way_before_anyone_is_preempted_for_them(
    llama: Pair, open_llm: OpenLLM, options: dict[str, Any]
) -> None:
    """As many preemptions as the same requests meet without: no page of a branch is missed by anyone."""
    batch = prompts((30, 5, 41, 17, 23, 9), seed=2)
    page_bytes = 16 * 2 * llama.judge.config.num_hidden_layers * 2 * 16 * 4
    scarce: dict[str, Any] = {"kv_cache_memory": 22 * page_bytes, "max_model_len": 96, "max_num_seqs": 6}
    llm = poisoned(open_llm(llama, **options, **scarce, prepared_windows=8))
    outputs = llm.generate(batch, SamplingParams(max_tokens=40, ignore_eos=True))
    assert token_ids(outputs) == [llama.greedy(prompt, 40) for prompt in batch]
    assert sum(o.metrics.preemptions for o in outputs) > 0
    assert hits(llm) > 0
    assert_at_rest(llm)


def test_a_prefix_cache_has_nothing_of_branches(llama: Pair, open_llm: OpenLLM) -> None:
    """The same texts again, longer, and cut within what was drafted behind them, on cached pages of either model."""
    prompt = prompts([20], seed=33)[0]
    text = prompt + llama.greedy(prompt, 60)
    llm = poisoned(open_llm(llama, window=5, prepared_windows=8, page_size=4))
    llm.generate([prompt], SamplingParams(max_tokens=40, ignore_eos=True))
    for length in (24, 33, 50, 60):
        wrong = [*text[: length - 1], (text[length - 1] + 1) % 299 + 1]
        for begin in (text[:length], wrong):
            output = llm.generate([begin], GREEDY)
            assert token_ids(output) == [llama.greedy(begin, TOKENS)]
            assert output[0].metrics.cached_tokens >= 20
    assert hits(llm) > 0
    assert_at_rest(llm)


@pytest.mark.parametrize("max_tokens", [*range(1, 9), 13])
def test_nothing_is_drafted_or_returned_past_the_end(llama: Pair, open_llm: OpenLLM, max_tokens: int) -> None:
    batch = prompts((4, 17, 9, 30), seed=34)
    llm = poisoned(open_llm(llama, window=6, prepared_windows=12, max_model_len=64), seed=2)
    outputs = llm.generate(batch, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
    assert token_ids(outputs) == [llama.greedy(prompt, max_tokens) for prompt in batch]
    for output in outputs:
        metrics = output.metrics
        assert metrics.accepted <= metrics.tested <= metrics.drafted
        assert metrics.prepared_accepted <= metrics.accepted
    assert_at_rest(llm)


def test_a_stop_token_within_a_prepared_window_ends_the_output(llama: Pair, open_llm: OpenLLM) -> None:
    batch = prompts((4, 17, 9, 30), seed=35)
    stops = [llama.greedy(prompt, TOKENS)[at] for prompt, at in zip(batch, (3, 8, 12, 20), strict=True)]
    params = [SamplingParams(max_tokens=TOKENS, ignore_eos=True, stop_token_ids=[stop]) for stop in stops]
    llm = poisoned(open_llm(llama, window=6, prepared_windows=12))
    outputs = llm.generate(batch, params)
    expected = [llama.greedy(prompt, TOKENS) for prompt in batch]
    assert token_ids(outputs) == [
        tokens[: tokens.index(stop) + 1] for tokens, stop in zip(expected, stops, strict=True)
    ]
    assert hits(llm) > 0
    assert_at_rest(llm)


def test_aborted_requests_leave_nothing(llama: Pair, open_llm: OpenLLM) -> None:
    batch = prompts((4, 17, 9), seed=36)
    llm = poisoned(open_llm(llama, window=6, prepared_windows=12))
    streams = [llm.stream(prompt, GREEDY) for prompt in batch]
    for stream in streams:
        next(iter(stream))
    for stream in streams:
        stream.close()
    assert_at_rest(llm)
    assert llm.generate(batch[:1], GREEDY)[0].outputs[0].token_ids == llama.greedy(batch[0], TOKENS)


def test_the_bundled_pair(open_llm: OpenLLM) -> None:
    texts = ["def mean(values):\n", "import os\n\n\nclass Path:\n", "for name in sorted("]
    params = SamplingParams(max_tokens=48, ignore_eos=True)
    plain = open_llm(method="autoregressive").generate(texts, params)
    rounds = []
    for branches in (0, 4):
        llm = open_llm(window=5, prepared_windows=branches)
        outputs = llm.generate(texts, params)
        assert token_ids(outputs) == token_ids(plain)
        rounds.append(sum(o.metrics.rounds for o in outputs))
    assert hits(llm) > 0
    assert rounds[1] < 0.9 * rounds[0]

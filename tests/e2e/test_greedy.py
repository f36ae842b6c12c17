"""Temperature 0: every method returns, token for token, what transformers' ``generate`` returns in fp32."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from e2e_support import (
    ALL_SETTINGS,
    DRAFTING_SETTINGS,
    NGRAM_SETTINGS,
    Pair,
    acceptance,
    assert_at_rest,
    greedy_reference,
    prompts,
    save,
    token_ids,
)

from pearl import LLM, SamplingParams
from pearl.messages import DraftPlan, DraftProposal

OpenLLM = Callable[..., LLM]
# One token, shorter than any window, a page and its neighbours, several pages, several chunks.
LENGTHS = (1, 2, 3, 15, 16, 17, 40, 70)
TOKENS = 24


@pytest.mark.parametrize("setting", ALL_SETTINGS)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_mixed_batch_equals_transformers(pairs: dict[str, Pair], open_llm: OpenLLM, family: str, setting: str) -> None:
    pair = pairs[family]
    batch = prompts(LENGTHS)
    # Fewer places than prompts and a small token budget: late joiners, chunks and all phases in one batch.
    llm = open_llm(pair, **ALL_SETTINGS[setting], max_num_seqs=5, max_num_batched_tokens=32)
    outputs = llm.generate(batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(outputs) == [pair.greedy(prompt, TOKENS) for prompt in batch]
    assert [o.outputs[0].finish_reason for o in outputs] == ["length"] * len(batch)
    assert all(o.metrics.output_tokens == TOKENS for o in outputs)
    if setting in DRAFTING_SETTINGS:
        assert 0.2 < acceptance(outputs) < 0.98
    assert_at_rest(llm)


@pytest.mark.parametrize("setting", ["speculative-3", "pearl-1", "pearl-3", "pearl-auto", "pearl-neither-4"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_coupled_rule_is_exact_at_temperature_zero(
    pairs: dict[str, Pair], open_llm: OpenLLM, family: str, setting: str
) -> None:
    pair, batch = pairs[family], prompts(LENGTHS, seed=1)
    llm = open_llm(pair, **ALL_SETTINGS[setting], verification="coupled")
    outputs = llm.generate(batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(outputs) == [pair.greedy(prompt, TOKENS) for prompt in batch]
    assert 0.2 < acceptance(outputs) < 0.98


@pytest.mark.parametrize("setting", NGRAM_SETTINGS)
def test_ngram_drafter_is_exact_where_it_is_often_right(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    """A prompt that holds the beginning of its own continuation, twice."""
    prompt = prompts([12], seed=5)[0]
    seen = prompt + llama.greedy(prompt, 20)
    batch = [seen + prompt, seen + seen[:15], prompt]
    llm = open_llm(llama, **NGRAM_SETTINGS[setting])
    outputs = llm.generate(batch, SamplingParams(max_tokens=30, ignore_eos=True))
    assert token_ids(outputs) == [llama.greedy(prompt, 30) for prompt in batch]
    assert sum(o.metrics.tested for o in outputs) > 0
    assert outputs[0].metrics.draft_forwards == 0


@pytest.mark.parametrize("setting", ["autoregressive", "speculative-3", "pearl-3", "pearl-neither-4", "pearl-no-pre-3"])
def test_preemption_changes_nothing(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    batch = prompts((30, 5, 41, 17, 23, 9), seed=2)
    pages = 11  # of 16 tokens; six sequences of up to 81 tokens want 24
    page_bytes = 16 * 2 * llama.judge.config.num_hidden_layers * 2 * 16 * 4
    models = 1 if setting == "autoregressive" else 2
    llm = open_llm(
        llama,
        **ALL_SETTINGS[setting],
        kv_cache_memory=pages * page_bytes * models,
        max_model_len=96,
        max_num_seqs=6,
        max_num_batched_tokens=24,
    )
    assert llm.engine.scheduler.target_kv.num_pages == pages
    outputs = llm.generate(batch, SamplingParams(max_tokens=40, ignore_eos=True))
    assert token_ids(outputs) == [llama.greedy(prompt, 40) for prompt in batch]
    assert sum(o.metrics.preemptions for o in outputs) > 0
    assert_at_rest(llm)


@pytest.mark.parametrize(("page_size", "chunk"), [(1, 1), (4, 7), (16, 16), (64, 512)])
def test_pages_and_chunks_of_any_size(pairs: dict[str, Pair], open_llm: OpenLLM, page_size: int, chunk: int) -> None:
    pair, batch = pairs["mistral"], prompts((1, 33, 64, 20), seed=3)
    llm = open_llm(pair, window=3, page_size=page_size, max_num_batched_tokens=chunk, max_model_len=128)
    outputs = llm.generate(batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(outputs) == [pair.greedy(prompt, TOKENS) for prompt in batch]
    assert_at_rest(llm)


@pytest.mark.parametrize("setting", ["pearl-2", "speculative-3"])
def test_context_filled_to_the_last_position(llama: Pair, open_llm: OpenLLM, setting: str) -> None:
    """max_tokens is cut to what the context holds, and the last position is used."""
    batch = prompts((60, 79, 77), seed=4)
    llm = open_llm(llama, **ALL_SETTINGS[setting], max_model_len=80)
    outputs = llm.generate(batch, SamplingParams(max_tokens=50, ignore_eos=True))
    assert token_ids(outputs) == [llama.greedy(p, 80 - len(p)) for p in batch]
    assert [o.outputs[0].finish_reason for o in outputs] == ["length"] * 3


def test_texts_are_encoded_and_decoded_as_transformers_does(llama: Pair, open_llm: OpenLLM) -> None:
    texts = ["def main():\n    return 1", "x", "Füße 漢字 🙂 and back"]
    llm = open_llm(llama, window=3)
    outputs = llm.generate(texts, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    encoded = [llama.tokenizer.encode(text) for text in texts]
    expected = [llama.greedy(ids, TOKENS) for ids in encoded]
    assert [o.prompt_token_ids for o in outputs] == encoded
    assert token_ids(outputs) == expected
    assert [o.prompt for o in outputs] == texts
    assert [o.outputs[0].text for o in outputs] == [
        llama.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected
    ]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_penalties_equal_transformers(pairs: dict[str, Pair], open_llm: OpenLLM, family: str) -> None:
    pair, batch = pairs[family], prompts((1, 9, 30, 50), seed=6)
    expected = [greedy_reference(pair.judge, p, TOKENS, repetition_penalty=1.4) for p in batch]
    assert all(reference.decisive == TOKENS for reference in expected)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, repetition_penalty=1.4)
    for setting in ("autoregressive", "pearl-1", "pearl-5", "pearl-neither-4", "speculative-3", "ngram-pearl"):
        outputs = open_llm(pair, **ALL_SETTINGS[setting]).generate(batch, params)
        assert token_ids(outputs) == [reference.tokens for reference in expected], setting
        if setting in DRAFTING_SETTINGS:
            assert 0.2 < acceptance(outputs) < 0.98
    assert [r.tokens for r in expected] != [pair.greedy(p, TOKENS) for p in batch]


@pytest.mark.parametrize("setting", ["pearl-1", "pearl-3", "pearl-no-post-3", "speculative-3"])
@pytest.mark.parametrize("verification", ["rejection", "coupled"])
def test_greedy_requests_are_not_touched_by_others_in_the_batch(
    llama: Pair, open_llm: OpenLLM, setting: str, verification: str
) -> None:
    """Greedy, sampled, penalised, biased, with logprobs and with n > 1: all in one batch."""
    batch = prompts((5, 20, 3, 40, 11, 7, 25, 2), seed=7)
    base: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}
    bias = {llama.greedy(batch[5], 1)[0]: -100.0}
    every = [
        SamplingParams(**base),
        SamplingParams(**base, temperature=1.3, seed=3),
        SamplingParams(**base, logprobs=2),
        SamplingParams(**base, temperature=0.7, top_k=20, top_p=0.9, seed=4, n=3),
        SamplingParams(**base, repetition_penalty=1.4),
        SamplingParams(**base, logit_bias=bias, presence_penalty=0.5),
        SamplingParams(**base, draft_temperature=2.0),
        SamplingParams(**base, temperature=1.0, seed=5, frequency_penalty=0.5, draft_temperature=0.0),
    ]
    llm = open_llm(llama, **ALL_SETTINGS[setting], verification=verification)
    outputs = llm.generate(batch, every)
    for index in (0, 2, 6):
        assert outputs[index].outputs[0].token_ids == llama.greedy(batch[index], TOKENS)
    penalised = greedy_reference(llama.judge, batch[4], TOKENS, repetition_penalty=1.4)
    assert outputs[4].outputs[0].token_ids == penalised.tokens
    assert outputs[5].outputs[0].token_ids[0] not in bias
    assert all(len(tokens) == TOKENS for tokens in token_ids(outputs))
    assert len(outputs[3].outputs) == 3
    assert_at_rest(llm)


def test_drafts_of_other_shapes_change_nothing(
    llama: Pair, open_llm: OpenLLM, unrelated_draft: str, tmp_path: Any
) -> None:
    """An unrelated draft of another family, and the target itself: acceptance near 0 and exactly 1."""
    batch = prompts((1, 20, 50), seed=8)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    expected = [llama.greedy(prompt, TOKENS) for prompt in batch]
    for window in (1, 4):
        stranger = open_llm(llama, draft=unrelated_draft, window=window).generate(batch, params)
        twin = open_llm(llama, draft=save(llama.judge, llama.tokenizer, tmp_path / "twin"), window=window)
        assert token_ids(stranger) == token_ids(twin.generate(batch, params)) == expected
        assert acceptance(stranger) < 0.2
        assert acceptance(twin.generate(batch, params)) == 1.0


@pytest.mark.parametrize("options", [{}, {"draft": "ngram"}], ids=("model", "ngram"))
def test_a_draft_that_works_alone_does_so_on_the_engines_thread(
    llama: Pair, open_llm: OpenLLM, options: dict[str, Any]
) -> None:
    for method, inline in (("speculative", True), ("pearl", False)):
        llm = open_llm(llama, method=method, window=3, **options)
        propose, threads = llm.engine.workers.drafter.propose, set()

        def spy(plan: DraftPlan, propose: Any = propose, threads: set[bool] = threads) -> DraftProposal:
            threads.add(threading.current_thread() is threading.main_thread())
            result: DraftProposal = propose(plan)
            return result

        llm.engine.workers.drafter.propose = spy
        prompt = prompts([9], seed=47)[0]
        assert token_ids(llm.generate([prompt], SamplingParams(max_tokens=16, ignore_eos=True))) == [
            llama.greedy(prompt, 16)
        ]
        assert (False not in threads) if inline else (False in threads)

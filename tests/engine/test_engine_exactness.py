"""Toy models with real logits: whatever the method, window, drafter and memory, the output is the target's."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import pytest
from engine_requests import request_of
from engine_toy import VOCAB, Toy
from hypothesis import given, settings
from hypothesis import strategies as st
from method_paces import METHODS
from random_pace import RandomPace

from pearl.sampling_params import SamplingParams
from pearl_kernels import select

PROMPTS = ([1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [1, 2, 9])
PENALTIES: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": 0.4,
    "logit_bias": {3: 1.5, 7: -4.0},
    "stop_token_ids": [5],
}


def alone(**params: Any) -> list[list[int]]:
    """Autoregressive decoding, each prompt by itself."""
    return _alone(json.dumps(params))


@functools.cache
def _alone(encoded: str) -> list[list[int]]:
    params = json.loads(encoded)
    if bias := params.get("logit_bias"):
        params["logit_bias"] = {int(token): value for token, value in bias.items()}
    return [Toy("autoregressive", "coupled").generate(p, seed=7 + i, **params)[0] for i, p in enumerate(PROMPTS)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize("ngram", [False, True])
def test_greedy_output_is_the_targets(method: str, rule: Any, ngram: bool) -> None:
    assert Toy(method, rule, ngram=ngram).generate(*PROMPTS) == alone()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("ngram", [False, True])
def test_coupled_output_is_seeded_autoregressive_decoding_at_any_temperature(method: str, ngram: bool) -> None:
    params = {"temperature": 0.9, "top_k": 12, "top_p": 0.95}
    assert Toy(method, "coupled", ngram=ngram).generate(*PROMPTS, **params) == alone(**params)


@settings(max_examples=12)
@given(
    st.sampled_from(list(METHODS)),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(0, 6),
    st.booleans(),
)
def test_coupled_output_does_not_depend_on_window_memory_or_company(
    method: str, window: int, lanes: int, budget: int, spare: int, penalties: bool
) -> None:
    params: dict[str, Any] = {"temperature": 1.0, "max_tokens": 7, **(PENALTIES if penalties else {})}
    toy = Toy(method, "coupled", window=window, lanes=lanes, budget=budget, num_pages=7 + spare, page_size=2)
    assert toy.generate(*PROMPTS, **params) == alone(**params)


@pytest.mark.parametrize("method", METHODS)
def test_penalties_and_minimum_length_see_the_same_text_in_a_window_as_token_by_token(method: str) -> None:
    assert Toy(method, blur=0.2).generate(*PROMPTS, **PENALTIES, min_tokens=9) == alone(**PENALTIES, min_tokens=9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("draft_temperature", [None, 0.0, 2.0])
def test_rejection_verifies_in_rounds_in_which_the_draft_rests(method: str, draft_temperature: float | None) -> None:
    """The residual needs the draft's logits of a window that was drafted in an earlier round."""
    toy = Toy(method, "rejection", blur=2.0)
    outputs = toy.generate(*PROMPTS, temperature=1.0, draft_temperature=draft_temperature)
    assert [len(output) for output in outputs] == [10] * len(PROMPTS)
    assert all(token < VOCAB for output in outputs for token in output)
    if method != "autoregressive":
        assert any(decision.rejected for record in toy.records for decision in record.result.decisions.values())


@pytest.mark.parametrize("method", METHODS)
def test_rejection_output_depends_only_on_the_seed_not_on_the_company(method: str) -> None:
    """Same method and window: the same draws, alone or in a batch.

    Where every position is drafted and tested, this holds even if preemptions cut windows differently; a method with
    bonus tokens draws those from another stream, wherever its windows happen to end.
    """
    every_position_is_tested = method in ("pearl", "whole-windows")
    pinned = method == "switching"  # modes change at other rounds in other company
    crowded: dict[str, int] = {"num_pages": 12, "page_size": 2} if every_position_is_tested else {}
    toy = Toy(method, lanes=2, pinned=pinned, **crowded)
    together = toy.generate(*PROMPTS, temperature=1.0)
    assert any(record.plan.preempted for record in toy.records) == bool(crowded)
    for i in (0, 3):
        assert Toy(method, pinned=pinned).generate(PROMPTS[i], temperature=1.0, seed=7 + i) == [together[i]]


@pytest.mark.parametrize("method", METHODS)
def test_pinned_requests_are_judged_token_by_token_under_the_block_rule(method: str) -> None:
    """Beside greedy ones."""
    every = [SamplingParams(max_tokens=20, temperature=float(i != 1)) for i in range(len(PROMPTS))]
    expected = Toy(method, "rejection", blur=1.0, pinned=True).run(PROMPTS, every)
    assert Toy(method, "block", blur=1.0, pinned=True).run(PROMPTS, every) == expected
    assert Toy(method, "block", blur=1.0, pinned=True, kernels=select()).run(PROMPTS, every) == expected


@pytest.mark.parametrize("window", [1, 2, 3, 5])
@pytest.mark.parametrize("blur", [0.2, 2.0])
def test_what_a_pinned_request_says_does_not_depend_on_modes_and_windows(window: int, blur: float) -> None:
    """Under the rejection rule its draws are those of PEARL, where every position is drafted and tested."""
    expected = Toy("pearl", "rejection", blur=blur).generate(*PROMPTS, temperature=1.0, max_tokens=24)
    crowded = Toy("switching", "rejection", window=window, num_pages=20, page_size=2, blur=blur, pinned=True)
    assert crowded.generate(*PROMPTS, temperature=1.0, max_tokens=24) == expected
    modes = {record.plan.pace.mode for record in crowded.records if record.plan.pace is not None}
    assert len(modes) > 3
    for mode in ("speculative", "pre-verify-only", "two-halves", "autoregressive"):
        toy = Toy("switching", "rejection", window=window, blur=blur, pinned=True)
        toy.scheduler._pace = RandomPace(window, modes=[mode])  # type: ignore[list-item]
        assert toy.generate(PROMPTS[1], temperature=1.0, seed=8, max_tokens=24) == [expected[1]]


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("method", ["pearl", "switching"])
def test_a_seed_gives_the_same_output_however_windows_are_cut_from_the_text(method: str, window: int) -> None:
    """Of prompt lookup, whose matches are many: three tokens are all that is ever said."""
    prompts = [[random.Random(i).choice([1, 2, 3]) for _ in range(12)] for i in range(4)]
    params: dict[str, Any] = {"temperature": 1.0, "max_tokens": 80, "logit_bias": {1: 30.0, 2: 30.0, 3: 30.0}}
    expected = Toy("pearl", window=3, ngram=True, pinned=True).generate(*prompts, **params)
    assert Toy(method, window=window, ngram=True, pinned=True).generate(*prompts, **params) == expected


def test_a_batch_may_mix_greedy_and_sampled_requests_and_lengths() -> None:
    toy = Toy("pearl", "rejection")
    every = [SamplingParams(), SamplingParams(temperature=0.8, top_p=0.9), SamplingParams(temperature=1.5, top_k=3)]
    for i, params in enumerate(every):
        toy.engine.add(request_of(i, PROMPTS[i], 5 + i, params=params, eos_ids=(), seed=i))
    outputs: dict[int, list[int]] = {i: [] for i in range(3)}
    while toy.engine.has_work:
        for delta in toy.engine.step():
            outputs[delta.request_id] += delta.token_ids
    assert [len(output) for output in outputs.values()] == [5, 6, 7]
    assert outputs[0] == alone()[0][:5]


def test_logprobs_are_the_targets_raw_ones_for_every_committed_token() -> None:
    """In one batch: of requests that ask for as many alternatives, for others, and for none; corrections too."""
    toy = Toy("pearl", "rejection", window=3, blur=2.0)
    texts = [list(prompt) for prompt in PROMPTS]
    for i, most in enumerate((2, 2, None, 0)):
        params = SamplingParams(logprobs=most, temperature=1.0, max_tokens=15, repetition_penalty=1.3)
        toy.engine.add(request_of(i, PROMPTS[i], 15, params=params, eos_ids=(), seed=i))
    while toy.engine.has_work:
        for delta in toy.engine.step():
            text = texts[delta.request_id]
            if delta.request_id == 2:
                assert delta.logprobs is None
                text += delta.token_ids
                continue
            assert delta.logprobs is not None
            for token, entry in zip(delta.token_ids, delta.logprobs, strict=True):
                raw = toy.target.logits(text)[:VOCAB].log_softmax(-1)
                assert entry.logprob == pytest.approx(raw[token].item(), abs=1e-5)
                most = 0 if delta.request_id == 3 else 2
                assert [i for i, _ in entry.top] == raw.topk(most).indices.tolist()
                text.append(token)
    assert [len(text) - len(prompt) for text, prompt in zip(texts, PROMPTS, strict=True)] == [15] * 4
    verdicts = [decision for record in toy.records for decision in record.result.decisions.values()]
    assert any(decision.rejected for decision in verdicts)
    assert any(decision.accepted > 1 for decision in verdicts)

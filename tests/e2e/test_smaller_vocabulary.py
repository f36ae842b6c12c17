"""A draft that lacks ids which its target has: in prompts, in outputs, under penalties. The output is the target's.

The draft knows 258 of 300 ids (six of eight in the enumerated model). A ring of logits is poisoned before it is used:
what is not written there must not be read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from e2e_support import DRAFTING_SETTINGS, KNOWN, Pair, acceptance, assert_at_rest, poison_ring, prompts, token_ids
from joint_frequencies import ALARM, DEPTH, PROMPT, V, exact_joint, params_of, small_pair, smallest_p

from pearl import LLM, SamplingParams

OpenLLM = Callable[..., LLM]
TOKENS = 24
LENGTHS = (1, 2, 3, 16, 17, 40, 70)


def lacks(tokens: list[int]) -> list[int]:
    """Places of ids that the draft does not have."""
    return [place for place, token in enumerate(tokens) if token >= KNOWN]


def check_greedy(pair: Pair, llm: LLM) -> None:
    batch = prompts(LENGTHS)
    expected = [pair.greedy(prompt, TOKENS) for prompt in batch]
    assert sum(bool(lacks(prompt)) for prompt in batch) > 3
    assert any(lacks(tokens[:-1]) for tokens in expected)
    outputs = llm.generate(batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(outputs) == expected
    # Random models lose the thread where they read something else: a token in ten is what is left of it.
    assert acceptance(outputs) > 0.1
    drafted = [t for o in outputs for t, d in zip(o.outputs[0].token_ids, o.outputs[0].drafted, strict=True) if d]
    assert max(drafted) < KNOWN
    assert_at_rest(llm)


@pytest.mark.parametrize(
    ("family", "setting"),
    [("llama", "pearl-3"), ("llama", "pearl-neither-4"), ("llama", "speculative-5"), ("qwen2", "pearl-3"),
     ("mistral", "pearl-1")],
)  # fmt: skip
def test_greedy_batches_equal_transformers(
    narrow: dict[str, Pair], open_llm: OpenLLM, family: str, setting: str
) -> None:
    options = {**DRAFTING_SETTINGS[setting], "max_num_seqs": 4, "max_num_batched_tokens": 32}
    check_greedy(narrow[family], open_llm(narrow[family], **options))


def test_so_do_those_of_a_rounded_draft(narrow: dict[str, Pair], open_llm: OpenLLM) -> None:
    check_greedy(narrow["qwen2"], open_llm(narrow["qwen2"], draft_weights="int8", window=3))


SAMPLED: dict[str, dict[str, Any]] = {
    "plain": {},
    "cut": {"top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "repetition": {"repetition_penalty": 1.3},
    "repetition rewarded": {"repetition_penalty": 0.8},
    "presence and frequency": {"presence_penalty": 1.0, "frequency_penalty": -0.7},
    "bias": {"logit_bias": {KNOWN + 3: 6.0, KNOWN + 7: 5.0, 299: -100.0, 7: 2.0}},
    "no end yet": {"min_tokens": 20, "stop_token_ids": [5, *range(KNOWN + 10, 300)], "ignore_eos": False},
}


@pytest.mark.parametrize("setting", ["pearl-3", "speculative-3"])
def test_coupled_equals_seeded_autoregressive(narrow: dict[str, Pair], open_llm: OpenLLM, setting: str) -> None:
    """Alone and beside requests whose logits depend on the host."""
    batch = prompts([9] * len(SAMPLED), seed=3)
    every = [
        SamplingParams(**{"temperature": 0.9, "seed": i, "max_tokens": TOKENS, "ignore_eos": True, **values})
        for i, values in enumerate(SAMPLED.values())
    ]
    pair = narrow["llama"]
    plain = token_ids(open_llm(pair, method="autoregressive").generate(batch, every))
    assert sum(bool(lacks(tokens[:-1])) for tokens in plain) > 4
    llm = open_llm(pair, **DRAFTING_SETTINGS[setting], verification="coupled")
    together = llm.generate(batch, every)
    assert token_ids(together) == plain
    assert acceptance(together) > 0.1
    for prompt, params, tokens in list(zip(batch, every, plain, strict=True))[:3]:
        assert token_ids(llm.generate([prompt], params)) == [tokens]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A draft without the ids 6, which the prompt ends with, and 7."""
    assert PROMPT[-1] == 6
    return small_pair(tmp_path_factory.mktemp("small"), draft_tokens=V - 2)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pearl": ({"window": 3}, {}),
    "speculative": ({"window": 4, "method": "speculative"}, {"draft_temperature": 2.0}),
    "cut to more than the draft has": ({"window": 2}, {"top_k": 7, "top_p": 0.98, "min_p": 0.001}),
    "biased": ({"window": 3}, {"logit_bias": {6: 1.0, 7: 2.0, 2: -1.0}, "n": 400}),
    "repetition": ({"window": 3}, {"repetition_penalty": 1.4, "n": 400}),
}


@pytest.mark.parametrize("case", CASES)
def test_joint_frequencies_are_the_targets(small: Pair, open_llm: OpenLLM, case: str) -> None:
    options, values = CASES[case]
    params = params_of(**{"n": 1000, "max_tokens": DEPTH, **values})
    joint = exact_joint(small, params)
    assert joint.sum((1, 2, 3, 4))[V - 2 :].sum() > 0.05
    llm = open_llm(small, **options, max_num_seqs=64)
    poison_ring(llm)
    outputs = llm.generate([PROMPT], params)
    assert smallest_p(token_ids(outputs), joint) > ALARM
    assert 0.1 < acceptance(outputs) < 0.98

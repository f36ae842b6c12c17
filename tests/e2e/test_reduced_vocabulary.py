"""A draft model of some of its target's layers, with the target's embeddings and some of its ids, as
``bench/train_drafter.py`` writes it: the output is the target's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from e2e_support import (
    DRAFTING_SETTINGS,
    SHAPE,
    VOCAB,
    Pair,
    acceptance,
    assert_at_rest,
    poison_ring,
    prompts,
    random_model,
    token_ids,
)
from graphed_llm import OpenGraphed
from joint_frequencies import ALARM, DEPTH, PROMPT, exact_joint, params_of, small_pair, smallest_p
from transformers import LlamaConfig

from bench.drafter_training.layers import TrainedLayers
from pearl import LLM, SamplingParams
from pearl.errors import ConfigurationError, UnsupportedModelError

OpenLLM = Callable[..., LLM]
TOKENS = 24
SAID = [token for token in range(VOCAB) if token % 4]


@pytest.fixture(scope="module")
def reduced(pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """All layers, rounded to bf16: so that random models agree where the id can be said. Qwen2's head is tied."""
    built = {}
    for name in ("llama", "qwen2"):
        folder = tmp_path_factory.mktemp(name)
        TrainedLayers(pairs[name].judge, 3, SAID).save(folder)
        built[name] = replace(pairs[name], draft=str(folder))
    return built


@pytest.mark.parametrize(
    ("family", "setting", "options"),
    [("llama", "pearl-3", {}), ("llama", "speculative-5", {"draft_weights": "int8"}), ("qwen2", "prepared-5", {}),
     ("qwen2", "pearl-neither-4", {"dtype": "float32"})],
)  # fmt: skip
def test_greedy_batches_equal_transformers(
    reduced: dict[str, Pair], open_llm: OpenLLM, family: str, setting: str, options: dict[str, Any]
) -> None:
    pair, batch = reduced[family], prompts((1, 2, 16, 17, 40, 70))
    expected = [pair.greedy(prompt, TOKENS) for prompt in batch]
    settings = {**DRAFTING_SETTINGS[setting], "max_num_seqs": 4, "max_num_batched_tokens": 32, **options}
    llm = open_llm(pair, **settings)
    outputs = llm.generate(batch, SamplingParams(max_tokens=TOKENS, ignore_eos=True))
    assert token_ids(outputs) == expected
    drafted = [t for o in outputs for t, d in zip(o.outputs[0].token_ids, o.outputs[0].drafted, strict=True) if d]
    assert drafted
    assert all(token % 4 for token in drafted)
    assert any(token % 4 == 0 for tokens in expected for token in tokens)
    assert acceptance(outputs) > 0.3
    assert_at_rest(llm)


def test_coupled_equals_seeded_autoregressive(reduced: dict[str, Pair], open_llm: OpenLLM) -> None:
    pair, batch = reduced["llama"], prompts([9] * 4, seed=3)
    values: list[dict[str, Any]] = [
        {},
        {"top_k": 40, "top_p": 0.9},
        {"repetition_penalty": 1.3},
        {"logit_bias": {8: 6}},
    ]
    every = [SamplingParams(temperature=0.9, seed=i, max_tokens=TOKENS, **v) for i, v in enumerate(values)]
    plain = token_ids(open_llm(pair, method="autoregressive").generate(batch, every))
    outputs = open_llm(pair, window=3, verification="coupled").generate(batch, every)
    assert token_ids(outputs) == plain
    assert acceptance(outputs) > 0.1


@pytest.mark.parametrize(
    ("options", "values"),
    [({"window": 3}, {}), ({"window": 2, "method": "speculative"}, {"top_k": 5, "draft_temperature": 2.0})],
    ids=["pearl", "speculative, cut"],
)
def test_joint_frequencies_are_the_targets(
    open_llm: OpenLLM, tmp_path: Path, options: dict[str, Any], values: dict[str, Any]
) -> None:
    pair = small_pair(tmp_path)
    TrainedLayers(pair.judge, 1, [1, 2, 4, 7]).save(tmp_path / "reduced")
    params = params_of(n=1000, max_tokens=DEPTH, **values)
    llm = open_llm(replace(pair, draft=str(tmp_path / "reduced")), **options, max_num_seqs=64)
    poison_ring(llm)
    outputs = llm.generate([PROMPT], params)
    assert smallest_p(token_ids(outputs), exact_joint(pair, params)) > ALARM
    assert 0.1 < acceptance(outputs) < 0.98


def test_captured_forwards_draft_the_same(
    reduced: dict[str, Pair], open_llm: OpenLLM, open_graphed: OpenGraphed
) -> None:
    batch, params = prompts((1, 9, 17), seed=4), SamplingParams(temperature=0.9, seed=1, max_tokens=TOKENS)
    expected = open_llm(reduced["qwen2"], window=3).generate(batch, params)
    graphed = open_graphed(reduced["qwen2"], window=3)
    outputs = graphed.llm.generate(batch, params)
    assert token_ids(outputs) == token_ids(expected)
    assert acceptance(outputs) == acceptance(expected) > 0.1
    assert all(queue.replayed > 2 for queue in graphed.queues)


def test_embeddings_come_from_a_target_that_fits(reduced: dict[str, Pair], open_llm: OpenLLM, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="LlamaForCausalLM lends none; take another"):
        open_llm(reduced["llama"], backend="transformers", draft_backend="native")
    with pytest.raises(UnsupportedModelError, match="has a reduced_vocab_size, which only the native decoder runs"):
        open_llm(reduced["llama"], draft_backend="transformers")
    TrainedLayers(random_model(LlamaConfig(**{**SHAPE, "hidden_size": 80}), 0), 1, SAID).save(tmp_path)
    with pytest.raises(ConfigurationError, match="hidden_size=80, this one has 64"):
        open_llm(replace(reduced["llama"], draft=str(tmp_path)))

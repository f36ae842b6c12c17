"""The drafters that come with ``pearl demo``: they fit a model of SmolLM2's shape, draft for it, and cost no token."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_support import byte_tokenizer, prompts, random_model, save, token_ids
from transformers import LlamaConfig

from pearl import LLM, SamplingParams
from pearl.demo.packaged_model import DRAFTERS

# But for the feed-forward width, which a head does not see, and the weights.
SHAPE = LlamaConfig(
    hidden_size=576, intermediate_size=64, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=256,
)  # fmt: skip


@pytest.mark.parametrize("name", DRAFTERS)
def test_it_drafts_for_a_model_of_that_shape(tmp_path: Path, name: str) -> None:
    assert sum(file.stat().st_size for file in DRAFTERS[name].iterdir()) < 20e6  # a wheel carries both
    target = save(random_model(SHAPE, seed=0), byte_tokenizer(), tmp_path)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    with LLM(
        target=target, draft=str(DRAFTERS[name]), window=3, device="cpu", dtype="float32", prefix_caching=False
    ) as llm:
        outputs = llm.generate(prompts((3, 17, 40)), params)
        with llm.variant(method="autoregressive") as plain:
            assert token_ids(outputs) == token_ids(plain.generate(prompts((3, 17, 40)), params))
    assert all(output.metrics.drafted > 0 for output in outputs)

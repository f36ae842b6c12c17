"""The table of cosines and sines against transformers' own initialisers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CONTEXT, LLAMA3, SHAPE, YARN, rope
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pearl.errors import ConfigurationError, UnsupportedModelError
from pearl.models import ModelConfig
from pearl.models.rope import cos_sin_table

KINDS: dict[str, dict[str, Any]] = {
    "default": rope("default"),
    "linear": rope("linear", factor=3.0),
    "dynamic": rope("dynamic", factor=2.0),
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-attention-factor": rope("yarn", factor=4.0, original_max_position_embeddings=32, attention_factor=0.7),
    "yarn-mscale": rope("yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.2, mscale_all_dim=0.8),
    "yarn-betas": rope("yarn", factor=8.0, original_max_position_embeddings=16, beta_fast=16.0, beta_slow=2.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_table_equals_transformers(kind: str) -> None:
    config = LlamaConfig(**{**SHAPE, "head_dim": 32, "architectures": ["LlamaForCausalLM"], **KINDS[kind]})
    positions = torch.arange(CONTEXT)[None]
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    table = cos_sin_table(ModelConfig.from_transformers(config).rope, 32, CONTEXT, CONTEXT)
    torch.testing.assert_close(table, torch.cat((cos[0, :, :16], sin[0, :, :16]), -1), rtol=1e-5, atol=1e-5)


def test_dynamic_scaling_changes_nothing_up_to_the_original_length_and_is_refused_beyond() -> None:
    """Beyond it frequencies would change with every token: cached keys would contradict new ones."""
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    default = cos_sin_table({"rope_type": "default", "rope_theta": 1e4}, 32, 64, 64)
    assert torch.equal(cos_sin_table(parameters, 32, 64, 64), default)
    with pytest.raises(
        ConfigurationError, match=r"max_model_len=65 is above the 64 positions .* give max_model_len=64"
    ):
        cos_sin_table(parameters, 32, 64, 65)


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'mrope' is not supported"):
        cos_sin_table({"rope_type": "mrope", "rope_theta": 1e4}, 32, 64, 64)

"""The table of cosines and sines against transformers' own initialisers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CONTEXT, LLAMA3, SHAPE, YARN, rope
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from pearl.errors import UnsupportedModelError
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


def test_dynamic_scaling_is_fixed_for_the_longest_sequence() -> None:
    """A pure function of position: what is cached for a position never contradicts what is computed later."""
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    short, long = (cos_sin_table(parameters, 32, 64, length) for length in (64, 256))
    assert torch.equal(short, cos_sin_table({"rope_type": "default", "rope_theta": 1e4}, 32, 64, 64))
    assert not torch.allclose(short, long[:64])
    stretched = 1e4 * (2.0 * 256 / 64 - 1.0) ** (32 / 30)
    expected = cos_sin_table({"rope_type": "default", "rope_theta": stretched}, 32, 256, 256)
    torch.testing.assert_close(long, expected)


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'longrope' is not supported"):
        cos_sin_table({"rope_type": "longrope", "rope_theta": 1e4}, 32, 64, 64)

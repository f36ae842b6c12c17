"""How many bytes a model's weights take, known from its configuration before any is read."""

from __future__ import annotations

import torch

from pearl.models.model_config import ModelConfig
from pearl.models.sharding import shard


def weight_bytes(config: ModelConfig, dtype: torch.dtype, rank: int = 0, ranks: int = 1) -> int:
    """Bytes of what ``load_model`` holds of a model, or of one tensor-parallel rank's part, as the provider for GPUs
    keeps it: matrices unpacked, a tied head that is the embedding itself. Raises ConfigurationError as ``shard``.
    """
    sharding = shard(config, rank, ranks)
    embedding = config.vocab_size * config.hidden  # whole on every rank
    shares_embedding = config.tied and ranks == 1
    head = 0 if shares_embedding else sharding.vocab.size * config.hidden
    layer = _layer_elements(sharding.config, sharding.is_first)
    return (embedding + config.layers * layer + config.hidden + head) * dtype.itemsize


def _layer_elements(config: ModelConfig, is_first: bool) -> int:
    """Of one layer; ``config`` is the rank's own shape. The biases of row-parallel matrices are the first rank's."""
    d, q, kv, f = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim, config.ffn
    matrices = d * (q + 2 * kv) + q * d + 3 * d * f
    norms = 2 * d + 2 * config.head_dim * config.qk_norm
    column_biases = (q + 2 * kv) * config.qkv_bias + 2 * f * config.mlp_bias
    row_biases = d * (config.output_bias + config.mlp_bias) * is_first
    return matrices + norms + column_biases + row_biases

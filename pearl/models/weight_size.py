"""How many bytes a model's weights take, known from its configuration before any is read."""

from __future__ import annotations

import torch

from pearl.models.decoder_tensors import LAYER_NORMS, decoder_tensors, matrix_shapes
from pearl.models.model_config import ModelConfig
from pearl.models.model_shape import ModelShape
from pearl.models.quantized_storage import Storage
from pearl.models.sharding import shard
from pearl.models.transformers_backend import TransformersConfig


def weight_bytes(
    config: ModelShape, dtype: torch.dtype, rank: int = 0, ranks: int = 1, device: str = "cuda"
) -> int:  # fmt: skip
    """Bytes of what ``load_model`` holds of a model, or of one tensor-parallel rank's part, as the provider for GPUs
    keeps it: matrices unpacked, a tied head that is the embedding itself. Raises ConfigurationError as ``shard``.

    ``device``: torch's type of it; quantised matrices are kept as its providers can (padding aside). A rank decodes
    them.
    """
    if isinstance(config, TransformersConfig):
        return config.parameters * dtype.itemsize
    assert isinstance(config, ModelConfig)
    sharding = shard(config, rank, ranks)
    embedding = config.vocab_size * config.hidden  # whole on every rank
    shares_embedding = config.tied and ranks == 1
    head = 0 if shares_embedding else sharding.vocab.size * config.hidden
    layer = _layer_elements(sharding.config, sharding.is_first)
    plain = (embedding + config.layers * layer + config.hidden + head) * dtype.itemsize
    return plain - (_saved_bytes(config, dtype, device) if ranks == 1 else 0)


def _saved_bytes(config: ModelConfig, dtype: torch.dtype, device: str) -> int:
    """What quantised matrices take less than plain ones."""
    if config.quantization is None:
        return 0
    saved = 0
    for name, (outputs, inputs) in matrix_shapes(decoder_tensors(config)).items():
        storage = config.quantization.storage_of(name)
        if storage is None or storage.keeps_bits == 0 or (storage.is_fp8 and device == "cpu"):
            continue
        saved += outputs * inputs * dtype.itemsize - _quantized_bytes(storage, outputs, inputs)
    return saved


def _quantized_bytes(storage: Storage, outputs: int, inputs: int) -> int:
    """Numbers, and an fp32 scale and maybe an offset for each group."""
    groups = -(-inputs // storage.group_of(inputs))
    return outputs * inputs * storage.keeps_bits // 8 + 4 * outputs * groups * (2 if storage.offsets else 1)


def _layer_elements(config: ModelConfig, is_first: bool) -> int:
    """Of one layer; ``config`` is the rank's own shape. The biases of row-parallel matrices are the first rank's."""
    d, q, kv, f = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim, config.ffn
    matrices = d * (q + 2 * kv) + q * d + 3 * d * f
    qk_norms = {"none": 0, "head": 2 * config.head_dim, "projection": q + kv}
    norms = d * sum(norm is not None for norm in LAYER_NORMS[config.norms]) + qk_norms[config.qk_norm]
    column_biases = (q + 2 * kv) * config.qkv_bias + 2 * f * config.mlp_bias
    row_biases = d * (config.output_bias + config.mlp_bias) * is_first
    return matrices + norms + column_biases + row_biases

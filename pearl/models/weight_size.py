"""How many bytes a model's weights take, known from its configuration before any is read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pearl.models.decoder_tensors import EXPERTS, LAYER_NORMS, decoder_tensors, matrix_shapes
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
    layers = _layers_elements(sharding.config, sharding.is_first)
    plain = (embedding + layers + config.hidden + head) * dtype.itemsize
    return plain - (_saved_bytes(config, dtype, device) if ranks == 1 else 0)


def read_bytes(config: ModelShape, dtype: torch.dtype, rows: float = 1, device: str = "cuda") -> int:
    """Bytes of weights that a forward of so many rows reads: of a mixture of experts those that the rows can be
    expected to meet.
    """
    held = weight_bytes(config, dtype, device=device)
    if not isinstance(config, ModelConfig) or config.mixture is None:
        return held
    shapes = matrix_shapes(decoder_tensors(config))
    experts = sum(_kept_bytes(config, name, shapes[name], dtype, device) for name in shapes if EXPERTS in name)
    return held - round(experts * (1 - config.mixture.expected_experts(rows) / config.mixture.experts))


def _saved_bytes(config: ModelConfig, dtype: torch.dtype, device: str) -> int:
    """What quantised matrices take less than plain ones."""
    if config.quantization is None:
        return 0
    return sum(
        outputs * inputs * dtype.itemsize - _kept_bytes(config, name, (outputs, inputs), dtype, device)
        for name, (outputs, inputs) in matrix_shapes(decoder_tensors(config)).items()
    )


def _kept_bytes(config: ModelConfig, name: str, shape: tuple[int, int], dtype: torch.dtype, device: str) -> int:
    """Of one matrix."""
    storage = _kept_storage(config, name, device)
    return shape[0] * shape[1] * dtype.itemsize if storage is None else _quantized_bytes(storage, *shape)


def _kept_storage(config: ModelConfig, name: str, device: str) -> Storage | None:
    """How a quantised matrix is stored that need not be decoded on a device of this type."""
    storage = None if config.quantization is None else config.quantization.storage_of(name)
    if storage is None or storage.keeps_bits == 0 or (storage.is_fp8 if device == "cpu" else EXPERTS in name):
        return None
    return storage


def kept_matrices(config: ModelConfig, device: str) -> Mapping[str, Storage]:
    """How the quantised matrices are stored that need not be decoded on a device of this type, by their modules."""
    stored = {name: _kept_storage(config, name, device) for name in matrix_shapes(decoder_tensors(config))}
    return {name: storage for name, storage in stored.items() if storage is not None}


def _quantized_bytes(storage: Storage, outputs: int, inputs: int) -> int:
    """Numbers, and an fp32 scale and maybe an offset for each group."""
    groups = -(-inputs // storage.group_of(inputs))
    return outputs * inputs * storage.keeps_bits // 8 + 4 * outputs * groups * (2 if storage.offsets else 1)


def _layers_elements(config: ModelConfig, is_first: bool) -> int:
    """Of all layers; ``config`` is the rank's own shape. The biases of row-parallel matrices are the first rank's."""
    d, q, kv, f = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim, config.ffn
    qk_norms = {"none": 0, "head": 2 * config.head_dim, "projection": q + kv}
    norms = d * sum(norm is not None for norm in LAYER_NORMS[config.norms]) + qk_norms[config.qk_norm]
    attention = d * (q + 2 * kv) + q * d + (q + 2 * kv) * config.qkv_bias + d * config.output_bias * is_first
    dense = 3 * d * f + (2 * f + d * is_first) * config.mlp_bias
    mixture = config.mixture
    if mixture is None:
        return config.layers * (norms + attention + dense)
    shared = 3 * d * mixture.shared + d if mixture.shared else 0
    sparse = mixture.experts * (3 * d * mixture.hidden + d) + shared
    return config.layers * (norms + attention) + mixture.layers * sparse + (config.layers - mixture.layers) * dense

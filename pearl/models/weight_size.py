"""How many bytes a model's weights take, known from its configuration before any is read."""

from __future__ import annotations

import math

import torch

from pearl.models.decoder_tensors import EXPERTS, LAYER_NORMS, decoder_tensors, matrix_shapes
from pearl.models.kept_matrices import kept_matrices, packer_on
from pearl.models.model_config import ModelConfig
from pearl.models.model_shape import ModelShape
from pearl.models.sharding import shard
from pearl.models.transformers_backend import TransformersConfig


def weight_bytes(
    config: ModelShape, dtype: torch.dtype, rank: int = 0, ranks: int = 1, device: str = "cuda"
) -> int:  # fmt: skip
    """Bytes of what ``load_model`` holds of a model, or of one tensor-parallel rank's part, as the provider for GPUs
    keeps it: matrices unpacked, a tied head that is the embedding itself. Raises ConfigurationError as ``shard``.

    ``device``: torch's type of it; quantised matrices are kept as ``kept_matrices`` says (padding aside).
    """
    if isinstance(config, TransformersConfig):
        return config.parameters * dtype.itemsize
    assert isinstance(config, ModelConfig)
    sharding = shard(config, rank, ranks)
    embedding = config.vocab_size * config.hidden  # whole on every rank
    shares_embedding = config.tied and ranks == 1 and not config.reduced_vocab
    head = 0 if shares_embedding else (config.reduced_vocab or sharding.vocab.size) * config.hidden
    layers = _layers_elements(sharding.config, sharding.is_first)
    plain = (embedding + layers + config.hidden + head) * dtype.itemsize
    sinks = config.layers * sharding.heads.size * torch.float32.itemsize if config.sinks else 0
    return plain + sinks - _saved_bytes(config, dtype, device, ranks)


def read_bytes(config: ModelShape, dtype: torch.dtype, rows: float = 1, device: str = "cuda") -> int:
    """Bytes of weights that a forward of so many rows reads: of embeddings that are not the head too a few rows, which
    are not counted, of a mixture of experts those that the rows can be expected to meet.
    """
    held = weight_bytes(config, dtype, device=device)
    if not isinstance(config, ModelConfig):
        return held
    if config.reduced_vocab or not config.tied:
        held -= config.vocab_size * config.hidden * dtype.itemsize
    if config.mixture is None:
        return held
    shapes = {name: shape for name, shape in matrix_shapes(decoder_tensors(config)).items() if EXPERTS in name}
    kept = kept_matrices(config, packer_on(device, dtype))
    experts = sum(
        kept[name].nbytes(*shape) if name in kept else math.prod(shape) * dtype.itemsize
        for name, shape in shapes.items()
    )
    if config.mixture.biases:
        of_layer = config.mixture.experts * (2 * config.mixture.hidden + config.hidden)
        experts += config.mixture.layers * of_layer * dtype.itemsize
    return held - round(experts * (1 - config.mixture.expected_experts(rows) / config.mixture.experts))


def _saved_bytes(config: ModelConfig, dtype: torch.dtype, device: str, ranks: int) -> int:
    """What quantised matrices take less than plain ones."""
    shapes = matrix_shapes(decoder_tensors(config))
    kept = kept_matrices(config, packer_on(device, dtype), ranks)
    return sum(math.prod(shapes[name]) * dtype.itemsize - form.nbytes(*shapes[name]) for name, form in kept.items())


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
    biases = mixture.experts * (2 * mixture.hidden + d + 1) if mixture.biases else 0
    sparse = mixture.experts * (3 * d * mixture.hidden + d) + shared + biases
    return config.layers * (norms + attention) + mixture.layers * sparse + (config.layers - mixture.layers) * dense

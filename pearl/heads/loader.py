"""Weights of a head from its files."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from pearl.errors import ConfigurationError, ModelLoadError
from pearl.heads.config import EagleConfig, HeadConfig, MedusaConfig
from pearl.heads.eagle import EagleHead, EagleWeights
from pearl.heads.medusa import MedusaHead, MedusaWeights
from pearl.heads.tensors import HeadTensors
from pearl.models.draft_vocabulary import checked_ids
from pearl.models.fused_decoder import EmbeddingRows
from pearl.models.rope import cos_sin_table
from pearl.models.weight_memory import WeightMemory
from pearl_kernels import KernelSet, LinearWeight

Head = EagleHead | MedusaHead
Embed = Callable[[Tensor], Tensor]

_EAGLE_FILES = ("model.safetensors", "pytorch_model.bin")
_MEDUSA_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt", *_EAGLE_FILES)
_LAYER = "midlayer."
_EMBEDDING, _TO_TARGET, _TO_DRAFT = "embed_tokens.weight", "d2t", "t2d"


def load_head(
    path: str,
    config: HeadConfig,
    *,
    device: torch.device,
    max_model_len: int,
    kernels: KernelSet,
    embed: Embed,
    embedding_width: int,
    embeddings: EmbeddingRows | None = None,
) -> Head:
    """``embed``: the target's embeddings, of that width, for a head that has none of its own; ``embeddings``: where
    they are, if they are on the head's device and of its dtype.

    Raises ModelLoadError or UnsupportedModelError about its tensors, ConfigurationError where it needs another target.
    """
    with ExitStack() as stack:
        reader = _Reader(config, device, kernels)
        if isinstance(config, MedusaConfig):
            return reader.medusa(HeadTensors(path, _MEDUSA_FILES, _medusa_name, stack), config)
        tensors = HeadTensors(path, _EAGLE_FILES, _eagle_name, stack)
        return reader.eagle(tensors, config, max_model_len, embed, embedding_width, embeddings)


def _eagle_name(stored: str) -> str:
    """Its own name: some checkpoints have their layer as the first of several, or all under a model."""
    return re.sub(r"^layers\.0\.", _LAYER, stored.removeprefix("model."))


def _medusa_name(stored: str) -> str:
    return stored.removeprefix("medusa_head.")


class _Reader:
    def __init__(self, config: HeadConfig, device: torch.device, kernels: KernelSet) -> None:
        self._device, self._dtype, self._kernels = device, config.shape.dtype, kernels
        self._memory = WeightMemory(device)

    def medusa(self, tensors: HeadTensors, config: MedusaConfig) -> MedusaHead:
        d = config.shape.hidden
        table: dict[str, tuple[int, ...]] = {}
        for head in range(config.heads):
            for block in range(config.blocks):
                table[f"{head}.{block}.linear.weight"] = (d, d)
                table[f"{head}.{block}.linear.bias"] = (d,)
            table[f"{head}.{config.blocks}.weight"] = (config.shape.vocab_size, d)
        tensors.require(table, {})
        heads = range(config.heads)

        def stacked(index: int, *which: int) -> tuple[LinearWeight, Tensor]:
            """Of these heads, one matrix."""
            names = [f"{head}.{index}.linear." for head in which]
            matrix = self._matrix(tensors, *[name + "weight" for name in names])
            return matrix, self._vector(tensors, *[name + "bias" for name in names])

        later = tuple(tuple(stacked(index, head) for index in range(1, config.blocks)) for head in heads)
        outputs = tuple(self._matrix(tensors, f"{head}.{config.blocks}.weight") for head in heads)
        weights = MedusaWeights(stacked(0, *heads), later, outputs)
        return MedusaHead(config, weights, self._kernels)

    def eagle(
        self,
        tensors: HeadTensors,
        config: EagleConfig,
        max_model_len: int,
        embed: Embed,
        embedding_width: int,
        embeddings: EmbeddingRows | None,
    ) -> EagleHead:
        shape = config.shape
        table, optional = _eagle_tables(config)
        tensors.require(table, optional)
        target_ids = _target_ids(tensors, config)
        if _EMBEDDING in tensors.names:
            embedding = self._vector(tensors, _EMBEDDING)
            embed, embeddings = embedding.__getitem__, EmbeddingRows(embedding)
        elif embedding_width != shape.hidden:
            raise ConfigurationError(
                f"draft is {config.name} with hidden_size={shape.hidden} and without {_EMBEDDING}, but the target's "
                f"embeddings are {embedding_width} wide; choose the head that was trained for this target"
            )
        attention, mlp = _LAYER + "self_attn.", _LAYER + "mlp."
        projections = [f"{attention}{name}_proj" for name in "qkv"]
        weights = EagleWeights(
            fc=self._matrix(tensors, "fc.weight"),
            token_norm=self._vector(tensors, _LAYER + "input_layernorm.weight"),
            feature_norm=self._vector(tensors, _LAYER + "hidden_norm.weight"),
            qkv=self._matrix(tensors, *[name + ".weight" for name in projections]),
            qkv_bias=self._vector(tensors, *[name + ".bias" for name in projections]) if shape.qkv_bias else None,
            output=self._matrix(tensors, attention + "o_proj.weight"),
            output_bias=self._vector(tensors, attention + "o_proj.bias") if shape.output_bias else None,
            post_norm=self._vector(tensors, _LAYER + "post_attention_layernorm.weight"),
            gate_up=self._matrix(tensors, mlp + "gate_proj.weight", mlp + "up_proj.weight"),
            down=self._matrix(tensors, mlp + "down_proj.weight"),
            norm=self._vector(tensors, "norm.weight"),
            head=self._matrix(tensors, "lm_head.weight"),
            target_ids=None if target_ids is None else target_ids.to(self._device),
        )
        angles = cos_sin_table(shape.rope, shape.head_dim, shape.max_position_embeddings, max_model_len)
        return EagleHead(config, weights, angles.to(self._device), self._kernels, embed, embeddings)

    def _matrix(self, tensors: HeadTensors, *names: str) -> LinearWeight:
        """Of projections of one input, stacked."""
        merged = torch.cat([tensors.weight(name, self._device, self._dtype) for name in names])
        return self._memory.keep_matrix(self._kernels.pack_linear(merged))

    def _vector(self, tensors: HeadTensors, *names: str) -> Tensor:
        merged = torch.cat([tensors.weight(name, self._device, self._dtype) for name in names])
        return self._memory.keep(merged)


def _eagle_tables(config: EagleConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the tensors that must be there, and of those that may be."""
    shape, d = config.shape, config.shape.hidden
    q, kv, f = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, shape.ffn
    layer: dict[str, tuple[int, ...]] = {
        **{f"{name}.weight": (d,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")},
        "self_attn.q_proj.weight": (q, 2 * d),
        "self_attn.k_proj.weight": (kv, 2 * d),
        "self_attn.v_proj.weight": (kv, 2 * d),
        "self_attn.o_proj.weight": (d, q),
        "mlp.gate_proj.weight": (f, d),
        "mlp.up_proj.weight": (f, d),
        "mlp.down_proj.weight": (d, f),
    }
    if shape.qkv_bias:
        layer.update({f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", q), ("k", kv), ("v", kv))})
    if shape.output_bias:
        layer["self_attn.o_proj.bias"] = (d,)
    table = {_LAYER + name: size for name, size in layer.items()}
    table["fc.weight"] = d, len(config.hidden_layers) * config.target_hidden
    table["norm.weight"], table["lm_head.weight"] = (d,), (config.draft_vocab, d)
    maps = {_TO_TARGET: (config.draft_vocab,), _TO_DRAFT: (shape.vocab_size,)}
    if config.draft_vocab < shape.vocab_size:
        table[_TO_TARGET] = maps[_TO_TARGET]
    return table, {**maps, _EMBEDDING: (shape.vocab_size, d)}


def _target_ids(tensors: HeadTensors, config: EagleConfig) -> Tensor | None:
    """int64 ``[Vd]``: the target's id of each of the head's. ``d2t`` has by how much it is larger."""
    if _TO_TARGET not in tensors.names:
        return None
    ids = checked_ids(_TO_TARGET, tensors.read(_TO_TARGET), config.shape.vocab_size, offsets=True)
    if _TO_DRAFT in tensors.names and set(tensors.read(_TO_DRAFT).nonzero().flatten().tolist()) != set(ids.tolist()):
        raise ModelLoadError(f"{_TO_DRAFT} and {_TO_TARGET} name different ids of the target")
    return ids

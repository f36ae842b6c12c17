"""Names and shapes of the tensors that a decoder is made of, as transformers stores them."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from pearl.models.draft_vocabulary import TARGET_IDS
from pearl.models.families import Norms
from pearl.models.mixture import Mixture
from pearl.models.model_config import ModelConfig
from pearl.models.stored_experts import modern_name

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
EXPERTS = ".mlp.experts."  # in the names of experts' tensors
_BASE = "model."
_OWN = {"embed_tokens", "layers", "norm", "lm_head", TARGET_IDS}
# Constants that old checkpoints carry along: of our families' classes transformers declares the first harmless; the
# others are computed from it. And scales of a quantised KV cache, which ours is not.
_HARMLESS = re.compile(
    r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$"
    r"|self_attn\.(k_scale|v_scale|k_proj\.k_scale|v_proj\.v_scale|[kv]_proj\.output_scale)$"
)


class LayerNorms(NamedTuple):
    """Names of a layer's norms; None: there is none."""

    input: str | None
    attention_post: str | None
    mlp: str | None
    mlp_post: str | None


_INPUT, _AFTER_ATTENTION = "input_layernorm.weight", "post_attention_layernorm.weight"
_BEFORE_MLP, _AFTER_MLP = "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"
LAYER_NORMS: Mapping[Norms, LayerNorms] = {
    "before": LayerNorms(_INPUT, None, _AFTER_ATTENTION, None),  # what comes after attention is before the MLP
    "after": LayerNorms(None, _AFTER_ATTENTION, None, _AFTER_MLP),
    "around": LayerNorms(_INPUT, _AFTER_ATTENTION, _BEFORE_MLP, _AFTER_MLP),
}


@dataclass(frozen=True)
class StoredTensor:
    """``default``: with what transformers fills the tensor if a checkpoint lacks it; None: with random numbers."""

    shape: tuple[int, ...]
    default: float | None = None


def layer_prefix(index: int) -> str:
    return f"{_BASE}layers.{index}."


def decoder_tensors(config: ModelConfig) -> Mapping[str, StoredTensor]:
    """All that the whole model has, whichever ranks read them. Of tied models the head too: it may be stored. A draft
    with a reduced vocabulary has its ids, and a head with as many rows, if it is not tied.
    """
    table = {EMBEDDING: StoredTensor((config.vocab_size, config.hidden)), NORM: _norm(config, config.hidden)}
    for index in range(config.layers):
        prefix = layer_prefix(index)
        table.update((prefix + name, tensor) for name, tensor in _layer(config, config.mixture_of(index)))
    if not config.reduced_vocab:
        return {**table, HEAD: table[EMBEDDING]}
    table[TARGET_IDS] = StoredTensor((config.reduced_vocab,))
    return table if config.tied else {**table, HEAD: StoredTensor((config.reduced_vocab, config.hidden))}


def matrix_shapes(table: Mapping[str, StoredTensor]) -> Mapping[str, tuple[int, int]]:
    """``[outputs, inputs]`` of the linear layers' matrices, by the names of their modules."""
    return {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in table.items()
        if name != EMBEDDING and name.endswith(".weight") and len(tensor.shape) == 2
    }


def is_router(module: str) -> bool:
    """A choice has no small errors: routers are computed in full, however they are stored."""
    return module.endswith(("mlp.gate", "mlp.shared_expert_gate"))


def canonical_name(stored: str, table: Container[str]) -> str:
    """The decoder's name of a tensor: base models are saved without ``model.``, wrapped ones with one too many, and
    Mixtral's experts under names of their own.
    """
    stored = modern_name(stored)
    if stored.startswith(_BASE) and stored.removeprefix(_BASE) in table:
        return stored.removeprefix(_BASE)
    return _BASE + stored if _BASE + stored in table else stored


def is_decoders(name: str) -> bool:
    """Whether a tensor lies under the decoder's layers or head, constants aside.

    Others (a vision tower, a value or classification head, ...) have no part in its logits: they are ignored, as
    transformers ignores them.
    """
    while name.startswith(_BASE):
        name = name.removeprefix(_BASE)
    return name.split(".", 1)[0] in _OWN and not _HARMLESS.search(name)


def _norm(config: ModelConfig, size: int) -> StoredTensor:
    return StoredTensor((size,), 1.0 - config.norm_offset)


_Projection = tuple[str, int, int, bool]  # name, outputs, inputs, whether it has a bias


def _layer(config: ModelConfig, mixture: Mixture | None) -> Iterator[tuple[str, StoredTensor]]:
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for norm in LAYER_NORMS[config.norms]:
        if norm is not None:
            yield norm, _norm(config, config.hidden)
    feed_forward = _dense(config) if mixture is None else _sparse(config, mixture)
    for name, outputs, inputs, biased in (*_attention(config), *feed_forward):
        yield f"{name}.weight", StoredTensor((outputs, inputs))
        if biased:  # a router's transformers fills with random numbers
            yield f"{name}.bias", StoredTensor((outputs,), None if is_router(name) else 0.0)
    if config.sinks:
        yield "self_attn.sinks", StoredTensor((config.heads,))
    if config.qk_norm != "none":
        of_heads = config.qk_norm == "projection"
        yield "self_attn.q_norm.weight", _norm(config, q if of_heads else config.head_dim)
        yield "self_attn.k_norm.weight", _norm(config, kv if of_heads else config.head_dim)


def _attention(config: ModelConfig) -> Iterator[_Projection]:
    d, q, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    if config.merged_projections:
        yield "self_attn.qkv_proj", q + 2 * kv, d, config.qkv_bias
    else:
        yield "self_attn.q_proj", q, d, config.qkv_bias
        yield "self_attn.k_proj", kv, d, config.qkv_bias
        yield "self_attn.v_proj", kv, d, config.qkv_bias
    yield "self_attn.o_proj", d, q, config.output_bias


def _dense(config: ModelConfig) -> Iterator[_Projection]:
    d, f = config.hidden, config.ffn
    if config.merged_projections:
        yield "mlp.gate_up_proj", 2 * f, d, config.mlp_bias
    else:
        yield "mlp.gate_proj", f, d, config.mlp_bias
        yield "mlp.up_proj", f, d, config.mlp_bias
    yield "mlp.down_proj", d, f, config.mlp_bias


def _sparse(config: ModelConfig, mixture: Mixture) -> Iterator[_Projection]:
    d, biased = config.hidden, mixture.biases
    yield "mlp.gate", mixture.experts, d, biased
    widths = {f"mlp.experts.{expert}": mixture.hidden for expert in range(mixture.experts)}
    if mixture.shared:
        yield "mlp.shared_expert_gate", 1, d, False
        widths["mlp.shared_expert"] = mixture.shared
    for module, f in widths.items():
        yield f"{module}.gate_proj", f, d, biased
        yield f"{module}.up_proj", f, d, biased
        yield f"{module}.down_proj", d, f, biased

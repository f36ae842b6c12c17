"""What was recognised in a model's configuration, in a user's words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from pearl.models.model_config import ModelConfig

_NORMS = {
    "before": "norms before attention and feed-forward",
    "after": "norms after attention and feed-forward, none before",
    "around": "norms before and after attention and feed-forward",
}


def features(config: ModelConfig) -> Iterator[str]:
    """A few words for each feature in which families differ; those that a model lacks are left out."""
    yield _NORMS[config.norms] + (" (1 + weight)" if config.norm_offset else "")
    if config.qk_norm != "none":
        yield "queries and keys normed " + ("by head" if config.qk_norm == "head" else "over all heads")
    yield from _attention(config)
    yield from _ropes(config)
    yield from _mixture(config)
    yield "GELU (tanh)" if config.activation == "gelu_tanh" else "SiLU"
    biased = [name for name, there in (("qkv", config.qkv_bias), ("output", config.output_bias)) if there]
    if biased := [*biased, *(["feed-forward"] if config.mlp_bias else [])]:
        yield f"biases: {', '.join(biased)}"
    if config.embedding_scale != 1.0:
        yield f"embeddings times {config.embedding_scale:.6g}"
    if config.residual_multiplier != 1.0:
        yield f"sublayers times {config.residual_multiplier:.6g}"
    if config.logits_scale != 1.0:
        yield f"logits times {config.logits_scale:.6g}"
    if config.logits_softcap:
        yield f"logits capped at {config.logits_softcap:g}"
    if config.reduced_vocab:
        yield f"a draft that can say {config.reduced_vocab} of {config.vocab_size} ids"
    if config.borrows_embedding:
        yield "the embedding is its target's"
    if config.tied:
        yield "the head is the embedding" if not config.reduced_vocab else "the head's rows are the embedding's"


def _attention(config: ModelConfig) -> Iterator[str]:
    yield f"{config.heads} query and {config.kv_heads} KV heads of {config.head_dim}"
    for window, layers in Counter(config.windows).items():
        if window:
            yield f"a window of {window} tokens in {_some(layers, config)}"
    if config.query_scale is not None:
        yield f"attention scores times {config.query_scale:.6g}"
    if config.attention_softcap:
        yield f"attention scores capped at {config.attention_softcap:g}"
    if config.sinks:
        yield "attention sinks"


def _mixture(config: ModelConfig) -> Iterator[str]:
    mixture = config.mixture
    if mixture is None:
        return
    shared = f" and a shared one of width {mixture.shared}" if mixture.shared else ""
    where = _some(mixture.layers, config)
    yield f"{mixture.top_k} of {mixture.experts} experts of width {mixture.hidden}{shared} for a token in {where}"
    if mixture.biases:
        yield "biases: routers, experts"
    if math.isfinite(mixture.unit.limit):
        yield f"experts' gates and ups clamped at {mixture.unit.limit:g}, gain {mixture.unit.gain:g}"
    yield f"weights of experts {'add up to 1' if mixture.renormalise else 'are their probabilities among all'}"


def _ropes(config: ModelConfig) -> Iterator[str]:
    ropes = [config.rope_of(layer) for layer in range(config.layers)]
    kinds = Counter(None if rope is None else (rope["rope_type"], rope["rope_theta"]) for rope in ropes)
    for kind, layers in kinds.items():
        where = "" if len(kinds) == 1 else f" in {_some(layers, config)}"
        yield f"no RoPE{where}" if kind is None else f"RoPE {kind[0]}, theta {kind[1]:g}{where}"
    if config.unrotated:
        yield f"{config.rotary_dim} of {config.head_dim} lanes of a head rotated"


def _some(layers: int, config: ModelConfig) -> str:
    return "all layers" if layers == config.layers else f"{layers} of {config.layers} layers"

"""What a transformers configuration says about each feature in which families differ; values that make no sense are
refused by their fields' names, and so are fields that would change the result and are not implemented.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.families import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pearl.models.plain_files import PlainConfig

    Config: TypeAlias = PretrainedConfig | PlainConfig

Rope: TypeAlias = Mapping[str, Any]
Activation: TypeAlias = Literal["silu", "gelu_tanh"]

_ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Fields of our families' configuration classes. Those that are read here, in ModelConfig or by transformers itself to
# fill one of these:
_READ = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "original_max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "hidden_act", "hidden_activation", "rope_parameters",
    "sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "no_rope_layers",
    "no_rope_layer_interval", "query_pre_attn_scalar", "attention_multiplier", "attn_logit_softcapping",
    "qkv_bias", "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "shared_expert_intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers",
    "swiglu_alpha", "swiglu_limit", "final_logit_softcapping", "embedding_multiplier", "residual_multiplier",
    "logits_scaling",
}  # fmt: skip
# and those that change no logits: of training, and of what lies around the model.
_HARMLESS = {
    "initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "attention_dropout",
    "resid_pdrop", "embd_pdrop", "pretraining_tp", "output_router_logits", "router_aux_loss_coef",
    "router_jitter_noise",
}  # fmt: skip


class Multipliers(NamedTuple):
    """Of the embeddings, of what each sublayer adds to the residual, and of the logits."""

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0


def refuse_unknown(config: Config, family: Family) -> None:
    """UnsupportedModelError for a field of the family's class with a value that the decoder does not implement."""
    for name, allowed in family.neutral.items():
        value = getattr(config, name, allowed[0])
        if not any(value is each or (type(value) is type(each) and value == each) for each in allowed):
            raise UnsupportedModelError(f"{name}={value!r} is not supported in a {family.architecture}")
    defaults = getattr(type(config), "__dataclass_fields__", {})
    for name in vars(type(config)).get("__annotations__", ()):
        if name in _READ | _HARMLESS | family.neutral.keys() or name.startswith("_") or name not in defaults:
            continue
        value = getattr(config, name, defaults[name].default)
        if value != defaults[name].default:
            raise UnsupportedModelError(
                f"{name}={value!r} is a field of {family.architecture}'s configuration that this engine does not know"
            )


def activation(config: Config, family: Family) -> Activation:
    value = getattr(config, family.activation)
    if not isinstance(value, str) or value not in _ACTIVATIONS:
        known = ", ".join(map(repr, _ACTIVATIONS))
        raise UnsupportedModelError(
            f"activation {value!r} ({family.activation}) is not supported; the decoder knows {known}"
        )
    return _ACTIVATIONS[value]


def windows(config: Config, family: Family) -> tuple[int, ...]:
    """Those that the family's class uses, a number for each layer; 0: none."""
    layers: int = config.num_hidden_layers
    if family.windows == "none":
        return (0,) * layers
    window: int | None = config.sliding_window
    if family.windows == "all":
        return (0 if window is None else _checked_window(window),) * layers
    return tuple(_window_of(kind, window) for kind in config.layer_types)


def rope(config: Config, family: Family) -> Rope:
    """The parameters of layers that attend to all keys."""
    if not family.local_rope:
        return dict(config.rope_parameters)
    return dict(config.rope_parameters["full_attention"])


def layer_ropes(config: Config, family: Family) -> tuple[Rope | None, ...]:
    """A layer's parameters, where layers differ, else empty: Gemma 3's layers with windows have their own, SmolLM3's
    with a 0 in no_rope_layers none.
    """
    layers: int = config.num_hidden_layers
    if family.local_rope:
        return tuple(dict(config.rope_parameters[kind]) for kind in config.layer_types)
    rotated = getattr(config, "no_rope_layers", None)
    if not family.layers_without_rope or rotated is None:
        return ()
    require_one_for_each_layer(rotated, layers)
    return tuple(dict(config.rope_parameters) if each else None for each in rotated[:layers])


def require_one_for_each_layer(rotated: object, layers: int) -> None:
    """ModelLoadError unless no_rope_layers has a number for each layer."""
    if not isinstance(rotated, list | tuple) or len(rotated) < layers or {type(each) for each in rotated} - {int, bool}:
        raise ModelLoadError(f"no_rope_layers must have a 0 or 1 for each of the {layers} layers, not {rotated!r}")


def rotary_dim(parameters: Rope, family: Family, head_dim: int) -> int:
    """How many lanes of a head are rotated. Classes that rotate all ignore the factor where nothing is scaled."""
    factor = parameters.get("partial_rotary_factor", 1.0)
    if factor == 1.0 or (not family.partial_rotary and parameters["rope_type"] == "default"):
        return head_dim
    if not family.partial_rotary:
        raise UnsupportedModelError(
            f"partial_rotary_factor={factor!r} with scaled RoPE is not supported in a {family.architecture}"
        )
    number = isinstance(factor, int | float) and not isinstance(factor, bool) and 0 < factor <= 1
    if not number or int(head_dim * factor) % 2 or int(head_dim * factor) < 2:
        raise ModelLoadError(
            f"partial_rotary_factor must leave an even number of rotated lanes of a head of {head_dim}, not {factor!r}"
        )
    return int(head_dim * factor)


def query_scale(config: Config, family: Family) -> float | None:
    """Of attention scores; None: head_dim ** -0.5."""
    if family.query_scale == "query_pre_attn_scalar":
        return 1.0 / math.sqrt(_positive(config, "query_pre_attn_scalar"))
    return _positive(config, "attention_multiplier") if family.query_scale else None


def softcap(config: Config, field: str, family_has_it: bool) -> float:
    """0: none."""
    if not family_has_it or getattr(config, field) is None:
        return 0.0
    return _positive(config, field)


def multipliers(config: Config, family: Family) -> Multipliers:
    if family.scales_embeddings:
        return Multipliers(embedding=float(config.hidden_size**0.5))
    if not family.multipliers:
        return Multipliers()
    return Multipliers(
        _positive(config, "embedding_multiplier"),
        _positive(config, "residual_multiplier"),
        1.0 / _positive(config, "logits_scaling"),
    )


def _positive(config: Config, name: str) -> float:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelLoadError(f"{name} must be a finite number above 0, not {value!r}")
    return float(value)


def _window_of(kind: str, window: int | None) -> int:
    if kind == "full_attention":
        return 0
    if kind != "sliding_attention":
        raise UnsupportedModelError(
            f"layer_types has {kind!r}, which is not supported; the decoder knows full_attention and sliding_attention"
        )
    return _checked_window(window)


def _checked_window(window: int | None) -> int:
    if window is None or window < 1:
        raise ModelLoadError(f"sliding_window must be at least 1 where a layer uses it, not {window!r}")
    return window

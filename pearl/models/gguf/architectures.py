"""Architectures of GGUF files: how each one's metadata and tensors say what a transformers configuration says.

What llama.cpp takes for granted where a field is missing (src/llama-model.cpp) is taken here too. A field under the
architecture's name that nothing here reads would change what the model computes in a way not known: it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.gguf.metadata import Metadata
from pearl.models.gguf.names import TensorNames

Fields = dict[str, Any]
ROPE_FACTORS = "rope_freqs.weight"

# Fields of a transformers configuration, by the metadata that they are read from.
_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
}
KEYS = {
    **_SIZES,
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
    "rope_parameters": "rope.scaling",
}

_USUAL_SCALING = {"attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_log_multiplier": 0.0}


@dataclass(frozen=True)
class Architecture:
    """``rotates_pairs``: rows of queries and keys are in the order of neighbouring rotary lanes. ``optional_biases``: a
    linear layer has one where it is stored. ``norm_shift``: what transformers' norms are short of the stored ones.
    ``merges_by_place``: see ``GgufVocabulary``. ``more``: fields that only this architecture has.
    """

    model_type: str
    rotates_pairs: bool = False
    optional_biases: bool = False
    norm_shift: float = 0.0
    merges_by_place: bool = False
    names: TensorNames = field(default_factory=TensorNames)
    more: Callable[[Metadata, Collection[str]], Fields] = lambda metadata, tensors: {}


def _llama(metadata: Metadata, tensors: Collection[str]) -> Fields:
    """Mistral's files are Llama's; where they state its window, that is what tells them."""
    metadata.ignore("tensor_data_layout")  # of the checkpoint that was converted
    mlp = _has_bias(tensors, "ffn_gate", "ffn_up", "ffn_down")
    fields: Fields = {"attention_bias": _attention_bias(tensors), "mlp_bias": mlp}
    if metadata.value("attention.sliding_window") is not None:
        fields |= {"model_type": "mistral", "sliding_window": metadata.integer("attention.sliding_window")}
    return fields


def _qwen3(metadata: Metadata, tensors: Collection[str]) -> Fields:
    return {"attention_bias": _attention_bias(tensors)}


def _gemma2(metadata: Metadata, tensors: Collection[str]) -> Fields:
    return {
        "attn_logit_softcapping": metadata.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.number("final_logit_softcapping", 30.0),
        "sliding_window": metadata.integer("attention.sliding_window", 4096),  # of every other layer
        "query_pre_attn_scalar": _query_scalar(metadata, 46),
    }


def _gemma3(metadata: Metadata, tensors: Collection[str]) -> Fields:
    """Five layers with a window and a rope of their own, then one without."""
    _require(metadata, "attention.sliding_window_pattern", 6, "five layers with a window, then one without")
    local = {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", 10000.0)}
    fields: Fields = {
        "sliding_window": metadata.integer("attention.sliding_window"),
        "query_pre_attn_scalar": _query_scalar(metadata, 62),
        "rope_parameters": {"full_attention": _rope(metadata), "sliding_attention": local},
    }
    if metadata.value("final_logit_softcapping") is not None:
        fields["final_logit_softcapping"] = metadata.number("final_logit_softcapping")
    return fields


def _query_scalar(metadata: Metadata, layers_of_27b: int) -> int:
    """What scores are divided by the root of: a head's lanes, but in the largest model, which its layers tell."""
    heads, hidden = metadata.integer("attention.head_count"), metadata.integer("embedding_length")
    if metadata.integer("block_count") == layers_of_27b:
        return hidden // heads
    return metadata.integer("attention.key_length", max(1, hidden // heads))


_NORMS_AROUND = TensorNames(
    {
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)
ARCHITECTURES: Mapping[str, Architecture] = {
    "gemma": Architecture("gemma", norm_shift=1.0, merges_by_place=True),
    "gemma2": Architecture("gemma2", norm_shift=1.0, merges_by_place=True, names=_NORMS_AROUND, more=_gemma2),
    "gemma3": Architecture("gemma3_text", norm_shift=1.0, merges_by_place=True, names=_NORMS_AROUND, more=_gemma3),
    "llama": Architecture("llama", rotates_pairs=True, optional_biases=True, more=_llama),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", optional_biases=True, more=_qwen3),
}


def architecture_of(name: str) -> Architecture:
    """Raises UnsupportedModelError."""
    if name not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"general.architecture is {name!r}, which is not supported as GGUF; known are {', '.join(ARCHITECTURES)} "
            "(Mistral's files are llama's)"
        )
    return ARCHITECTURES[name]


def configuration_fields(name: str, metadata: Metadata, tensors: Collection[str], rows: int) -> Fields:
    """What transformers' configuration class takes, ``model_type`` and ``rope_parameters`` among it.

    tensors: names of all. rows: of the embedding, which is how many ids there are. Raises ModelLoadError or
    UnsupportedModelError.
    """
    architecture, own = architecture_of(name), metadata.under(f"{name}.")
    fields: Fields = {theirs: own.integer(key) for theirs, key in _SIZES.items()}
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    if hidden % heads and (name == "llama" or own.value("attention.key_length") is None):
        raise ModelLoadError(f"{name}.embedding_length={hidden} is no multiple of {name}.attention.head_count={heads}")
    fields |= {
        "model_type": architecture.model_type,
        "num_key_value_heads": own.integer("attention.head_count_kv", heads),
        "head_dim": own.integer("attention.key_length", max(1, hidden // heads)),
        "rms_norm_eps": own.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": own.integer("vocab_size", rows),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    _require(own, "attention.value_length", fields["head_dim"], "values as long as keys are supported")
    _require(own, "rope.dimension_count", fields["head_dim"], "heads that are rotated whole are supported")
    _require(own, "expert_count", 0, "feed-forward layers with experts are not supported as GGUF")
    _require(own, "expert_used_count", 0, "feed-forward layers with experts are not supported as GGUF")
    fields["rope_parameters"] = _rope(own)
    fields |= architecture.more(own, tensors)
    if unread := sorted(own.unread()):
        raise UnsupportedModelError(
            f"the metadata has {unread[0]}, of which nothing is known for {name} here: without it the output could be "
            "wrong; take the model's safetensors"
        )
    return fields


def _require(own: Metadata, name: str, only: int, why: str) -> None:
    if own.value(name) is not None and own.integer(name, least=0) != only:
        raise own.refuse(name, f"only {only} is known here ({why})")


def _rope(own: Metadata) -> Fields:
    """transformers' rope_parameters. Scaling is "linear" where the file does not say; older ones call its factor
    scale_linear."""
    own.ignore("rope.scaling.finetuned")
    for name, usual in _USUAL_SCALING.items():
        if own.number(f"rope.scaling.{name}", usual) != usual:
            raise own.refuse(f"rope.scaling.{name}", f"only {usual} is known here")
    rope: Fields = {"rope_type": "default", "rope_theta": own.number("rope.freq_base", 10000.0)}
    kind = own.text("rope.scaling.type", "linear")
    factor = own.number("rope.scaling.factor", own.number("rope.scale_linear", 1.0))
    original = own.integer("rope.scaling.original_context_length", 0, least=0)
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):  # 0 stands for none
        return rope
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise own.refuse("rope.scaling.type", "known are none, linear and yarn")
    yarn: Fields = {"rope_type": "yarn", "factor": factor}
    if original:
        yarn["original_max_position_embeddings"] = original
    for name in ("beta_fast", "beta_slow"):
        if own.value(f"rope.scaling.yarn_{name}") is not None:
            yarn[name] = own.number(f"rope.scaling.yarn_{name}")
    return rope | yarn


def _attention_bias(tensors: Collection[str]) -> bool:
    return _has_bias(tensors, "attn_q", "attn_k", "attn_v", "attn_output")


def _has_bias(tensors: Collection[str], *parts: str) -> bool:
    return any(name.endswith(tuple(f".{part}.bias" for part in parts)) for name in tensors)

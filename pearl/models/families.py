"""The model families that the decoder implements, by transformers' model_type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pearl.errors import UnsupportedModelError

# Where a layer has norms: before each sublayer (Llama), after it (of what it adds to the residual), or on both sides.
Norms: TypeAlias = Literal["before", "after", "around"]
# What q and k are normed over before the rotation: not at all, each head, or all heads of a token together.
QKNorm: TypeAlias = Literal["none", "head", "projection"]


@dataclass(frozen=True)
class Family:
    """What all models of a family share.

    ``windows``: which layers attend to a sliding window: none, all (where one is set), or as layer_types says.
    ``norm_offset``: what transformers' class adds to the stored weight of a norm.
    """

    architecture: str
    windows: Literal["none", "all", "by layer"]
    qkv_bias: bool | None = None  # None: what the configuration's attention_bias says
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: QKNorm = "none"
    norms: Norms = "before"
    norm_offset: float = 0.0
    merged_projections: bool = False  # q, k and v are stored as one matrix, and so are gate and up
    partial_rotary: bool = False  # partial_rotary_factor counts, for the class and for us
    rope_types: Mapping[str, str] = field(default_factory=dict)  # names that mean another one here


# CodeLlama and DeepSeek-Coder are Llama shapes. Llama has no window, whatever keys a configuration carries along.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", "none"),
    "ministral": Family("MinistralForCausalLM", "by layer", qkv_bias=False, output_bias=False, mlp_bias=False),
    "mistral": Family("MistralForCausalLM", "all", qkv_bias=False, output_bias=False, mlp_bias=False),
    "olmo2": Family("Olmo2ForCausalLM", "none", mlp_bias=False, qk_norm="projection", norms="after"),
    "phi3": Family(
        "Phi3ForCausalLM",
        "all",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        merged_projections=True,
        partial_rotary=True,
        rope_types={"su": "longrope", "yarn": "longrope"},
    ),
    "qwen2": Family("Qwen2ForCausalLM", "by layer", qkv_bias=True, output_bias=False, mlp_bias=False),
    "qwen3": Family("Qwen3ForCausalLM", "by layer", mlp_bias=False, qk_norm="head"),
    "smollm3": Family("SmolLM3ForCausalLM", "by layer"),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a configuration's model_type names; ``architectures`` does not matter, as in transformers.

    Raises UnsupportedModelError.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is not None:
        return family
    known = f"the decoder knows {', '.join(FAMILIES)}"
    if config.get("auto_map"):
        raise UnsupportedModelError(
            f"model_type {model_type!r} is defined by Python code in the model's folder (auto_map), and this engine "
            f"never runs code from a model's folder; {known}"
        )
    if model_type is None:
        raise UnsupportedModelError(f"the configuration has no model_type, which names the model's family; {known}")
    raise UnsupportedModelError(f"model_type {model_type!r} is not supported; {known}")

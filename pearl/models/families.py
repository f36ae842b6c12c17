"""The model families that the decoder implements, by transformers' model_type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from pearl.errors import UnsupportedModelError
from pearl.models.mixture import MixtureFields

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
    grouped_qkv: bool = False  # q, k and v are stored as one, in which each KV head has its queries, key and value
    stored_names: Mapping[str, str] = field(default_factory=dict)  # Llama's, in place of what matches in a tensor's
    attention_bias: str = "attention_bias"  # the configuration's field of that meaning
    mixture: MixtureFields | None = None  # of experts
    partial_rotary: bool = False  # partial_rotary_factor counts, for the class and for us
    # Which field of the configuration holds what; "": none does.
    activation: str = "hidden_act"
    query_scale: Literal["", "query_pre_attn_scalar", "attention_multiplier"] = ""  # the first: to the power of -1/2
    softcaps: bool = False  # final_logit_softcapping; and of attention scores, where attention_softcap says so
    attention_softcap: bool = False  # attn_logit_softcapping
    scales_embeddings: bool = False  # by the root of the model's width, rounded to its dtype
    multipliers: bool = False  # Granite's embedding_multiplier, residual_multiplier and logits_scaling
    layers_without_rope: bool = False  # no_rope_layers counts
    sinks: bool = False  # each query head has a logit that takes part in the softmax of its scores
    local_rope: bool = False  # layers with a window have rope parameters of their own
    # Fields that the class reads and we do not, with the values that change nothing.
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rope_types: Mapping[str, str] = field(default_factory=dict)  # names that mean another one here


_CAUSAL = {"use_bidirectional_attention": (None, False)}
_GEMMA: dict[str, Any] = {"mlp_bias": False, "norm_offset": 1.0, "scales_embeddings": True}

_INTERNLM2_NAMES = {
    r"(^|\.)tok_embeddings\.": r"\1embed_tokens.",
    r"^output\.": "lm_head.",
    r"\.attention\.wqkv\.": ".self_attn.qkv_proj.",
    r"\.attention\.wo\.": ".self_attn.o_proj.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.ffn_norm\.": ".post_attention_layernorm.",
    r"\.feed_forward\.w1\.": ".mlp.gate_proj.",
    r"\.feed_forward\.w3\.": ".mlp.up_proj.",
    r"\.feed_forward\.w2\.": ".mlp.down_proj.",
}

# CodeLlama and DeepSeek-Coder are Llama shapes. Llama has no window, whatever keys a configuration carries along.
FAMILIES: Mapping[str, Family] = {
    "gemma": Family("GemmaForCausalLM", "none", **_GEMMA, neutral=_CAUSAL),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        "by layer",
        **_GEMMA,
        norms="around",
        activation="hidden_activation",
        query_scale="query_pre_attn_scalar",
        softcaps=True,
        attention_softcap=True,
        neutral=_CAUSAL,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        "by layer",
        **_GEMMA,
        norms="around",
        qk_norm="head",
        activation="hidden_activation",
        query_scale="query_pre_attn_scalar",
        softcaps=True,
        local_rope=True,
        neutral={**_CAUSAL, "attn_logit_softcapping": (None,)},  # the class does not look at it, unlike Gemma 2's
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        "by layer",
        mlp_bias=False,
        sinks=True,
        mixture=MixtureFields(hidden="intermediate_size", renormalise="", clamped=True, biases=True, interleaved=True),
    ),
    "granite": Family("GraniteForCausalLM", "none", query_scale="attention_multiplier", multipliers=True),
    "internlm2": Family(
        "InternLM2ForCausalLM", "none", mlp_bias=False, grouped_qkv=True, stored_names=_INTERNLM2_NAMES
    ),
    "llama": Family("LlamaForCausalLM", "none"),
    "ministral": Family("MinistralForCausalLM", "by layer", qkv_bias=False, output_bias=False, mlp_bias=False),
    "mistral": Family("MistralForCausalLM", "all", qkv_bias=False, output_bias=False, mlp_bias=False),
    "mixtral": Family(
        "MixtralForCausalLM",
        "all",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        mixture=MixtureFields(hidden="intermediate_size", renormalise=""),
    ),
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
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        "by layer",
        attention_bias="qkv_bias",
        output_bias=False,
        mlp_bias=False,
        mixture=MixtureFields(shared="shared_expert_intermediate_size", dense_layers=True),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        "all",
        mlp_bias=False,
        qk_norm="head",
        mixture=MixtureFields(dense_layers=True),
    ),
    "smollm3": Family("SmolLM3ForCausalLM", "by layer", layers_without_rope=True),
}


TEXT_PARTS: Mapping[str, str] = {"gemma3": "gemma3_text"}


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
    if isinstance(model_type, str) and model_type in TEXT_PARTS:
        raise UnsupportedModelError(
            f"model_type {model_type!r} is a model of several modalities, which are not supported; take a checkpoint "
            f"of its text model alone (model_type {TEXT_PARTS[model_type]!r}); {known}"
        )
    if model_type is None:
        raise UnsupportedModelError(f"the configuration has no model_type, which names the model's family; {known}")
    raise UnsupportedModelError(f"model_type {model_type!r} is not supported; {known}")

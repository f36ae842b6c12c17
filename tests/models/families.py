"""Random small models of every supported family, saved by transformers and read by our loader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from pearl.models import Decoder, load_model
from pearl_kernels import Situation, select

CONTEXT = 128
SHAPE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "attn_implementation": "eager",
}


def rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **parameters}}


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "head_dim": 8, "tie_word_embeddings": False, **changes}))


LLAMA3 = rope(
    "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)  # fmt: skip
# Phi-4-mini's: a part of each head is rotated, each pair of lanes with a factor of its own.
LONGROPE: dict[str, Any] = {
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4 * CONTEXT,
    "original_max_position_embeddings": CONTEXT,
    **rope("longrope", partial_rotary_factor=0.75, short_factor=[1.0, 1.1, 1.3, 1.5, 2.5, 4.0], long_factor=[9.0] * 6),
}
IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # the classes' own lie beyond VOCAB


def phi3(**changes: Any) -> PreTrainedModel:
    return Phi3ForCausalLM(Phi3Config(**{**SHAPE, **IDS, **changes}))


# Caps and windows that these small numbers reach; a scale of scores that is not a head's.
GEMMA2: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 1.5,
    "final_logit_softcapping": 4.0,
    "sliding_window": 9,
}
GEMMA3: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 7,
    "sliding_window_pattern": 2,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "rope_local_base_freq": 500.0,
}
GRANITE: dict[str, Any] = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
    "logits_scaling": 8.0,
    "rms_norm_eps": 0.03,  # of the size that shows whether it fits a residual that is kept divided
}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32)
# As in the real ones: Mixtral's weights add up to 1, Qwen2-MoE's do not; Qwen3-MoE's as norm_topk_prob says.
QWEN_MOE: dict[str, Any] = {
    **SHAPE,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
}
# Windows in every other layer, YaRN whose bounds are not rounded; a limit that these small numbers reach.
GPT_OSS: dict[str, Any] = {
    **SHAPE,
    "head_dim": 8,
    "intermediate_size": 36,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "sliding_window": 9,
    "swiglu_limit": 1.0,
    **rope("yarn", factor=4.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=32),
}
MIXTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**{**SHAPE, "intermediate_size": 36}, num_local_experts=4)),
    "mixtral-window": lambda: MixtralForCausalLM(
        MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=4, head_dim=8, sliding_window=11)
    ),
    "gpt-oss": lambda: GptOssForCausalLM(GptOssConfig(**GPT_OSS)),
    "gpt-oss-32": lambda: GptOssForCausalLM(  # widths that MXFP4's groups divide
        GptOssConfig(**{**GPT_OSS, "hidden_size": 64, "intermediate_size": 32})
    ),
    "gpt-oss-odd": lambda: GptOssForCausalLM(
        GptOssConfig(**{**GPT_OSS, "intermediate_size": 20, "layer_types": ["full_attention"] * 3,
                        "attention_bias": False, "tie_word_embeddings": True, "swiglu_alpha": 1.2,
                        "swiglu_limit": 0.4, **rope("default")})
    ),
    "qwen2-moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**QWEN_MOE, shared_expert_intermediate_size=56, norm_topk_prob=False)
    ),
    "qwen2-moe-layers": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**QWEN_MOE, shared_expert_intermediate_size=100, mlp_only_layers=[0], norm_topk_prob=True,
                       qkv_bias=False, use_sliding_window=True, sliding_window=9, max_window_layers=2)
    ),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN_MOE, head_dim=16, norm_topk_prob=True)),
    "qwen3-moe-steps": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**QWEN_MOE, head_dim=8, decoder_sparse_step=2, norm_topk_prob=False, attention_bias=True,
                       use_sliding_window=True, sliding_window=9, tie_word_embeddings=True)
    ),
}  # fmt: skip
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    **MIXTURES,
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "llama-biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "llama-wide-heads": lambda: llama(head_dim=24),
    "llama-one-kv-head": lambda: llama(num_key_value_heads=1),
    "llama-left-over-window": lambda: llama(sliding_window=5),
    "llama-linear": lambda: llama(**rope("linear", factor=2.0)),
    "llama-dynamic": lambda: llama(**rope("dynamic", factor=2.0)),
    "llama-llama3": lambda: llama(**LLAMA3),
    "llama-yarn": lambda: llama(**YARN),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, head_dim=8, sliding_window=11)),
    "mistral-full": lambda: MistralForCausalLM(MistralConfig(**SHAPE, head_dim=8, sliding_window=None)),
    "ministral-layers": lambda: MinistralForCausalLM(
        MinistralConfig(
            **SHAPE,
            head_dim=8,
            sliding_window=9,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen2-sliding-layers": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=9, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**{**SHAPE, "num_key_value_heads": 1}, head_dim=16)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, **GEMMA2)),
    "gemma2-no-caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SHAPE, **{**GEMMA2, "attn_logit_softcapping": None, "final_logit_softcapping": None})
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, **GEMMA3)),
    "gemma3-cap": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**{**SHAPE, "tie_word_embeddings": False}, **{**GEMMA3, "final_logit_softcapping": 5.0})
    ),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SHAPE, **GRANITE, tie_word_embeddings=True)),
    "granite-biases": lambda: GraniteForCausalLM(
        GraniteConfig(**SHAPE, **{**GRANITE, "logits_scaling": 6.0}, attention_bias=True, mlp_bias=True)
    ),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SHAPE, **rope("default"))),
    "phi3-window": lambda: phi3(sliding_window=11),
    "phi3-partial-longrope": lambda: phi3(tie_word_embeddings=True, **LONGROPE),
    "phi3-partial": lambda: phi3(**rope("default", partial_rotary_factor=0.5)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SHAPE, **IDS, no_rope_layer_interval=2)),
    "smollm3-windows": lambda: SmolLM3ForCausalLM(
        SmolLM3Config(**SHAPE, **IDS, no_rope_layers=[0, 1, 0], use_sliding_window=True, sliding_window=7)
    ),
}


def build(name: str) -> PreTrainedModel:
    """Random weights, biases and norms included: a zero bias or a norm of ones would hide that it is ignored."""
    torch.manual_seed(sum(map(ord, name)))
    return randomised(FAMILIES[name]())


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.normal_(std=0.15)
    return model


def load(
    path: Path,
    dtype: torch.dtype = torch.float32,
    max_model_len: int = CONTEXT,
    prefer: Mapping[str, str] | None = None,
) -> Decoder:
    kernels = select(Situation("cpu", dtype), prefer)
    return load_model(path, device=torch.device("cpu"), dtype=dtype, max_model_len=max_model_len, kernels=kernels)

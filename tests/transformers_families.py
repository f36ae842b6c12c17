"""Random small models of families that run through transformers' own module, with the quirks of real configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 131
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_NO_GROUPS = {"num_key_value_heads": 6}
_OLD = {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 128, "rotary_dim": 4, **_NO_GROUPS}
_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_WINDOW = {"sliding_window": 9, "layer_types": _LAYERS}
# By a name of the test's own: model_type and what differs from _SHAPE.
FAMILIES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("afmoe", {**_WINDOW, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "num_dense_layers": 1}),
    "cohere": ("cohere", {"use_qk_norm": True, "logit_scale": 0.25}),
    "cohere2-windows": ("cohere2", {**_WINDOW, "head_dim": 8, "logit_scale": 0.25}),
    "exaone4-windows": ("exaone4", {**_WINDOW, "head_dim": 8}),
    "glm4": ("glm4", {"head_dim": 8}),
    "gpt2-scales-by-layer": ("gpt2", {**_OLD, "scale_attn_by_inverse_layer_idx": True, "tie_word_embeddings": True}),
    "gpt_bigcode-one-kv-head": ("gpt_bigcode", {**_OLD, "multi_query": True}),
    "gpt_neox-partial-rotary": ("gpt_neox", {**_NO_GROUPS, "rotary_pct": 0.25, "use_parallel_residual": True}),
    "gptj": ("gptj", _OLD),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5, "head_dim": 8}),
    "olmo-clipped": ("olmo", {"clip_qkv": 4.0}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "opt-offset": ("opt", {"ffn_dim": 80, "word_embed_proj_dim": 48, "do_layer_norm_before": True}),
    "opt-projected": ("opt", {"ffn_dim": 80, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "persimmon": ("persimmon", _NO_GROUPS),
    "phi": ("phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True}),
    "starcoder2-window": ("starcoder2", {"sliding_window": 11, "use_bias": True}),
    "vaultgemma-softcap": (
        "vaultgemma",
        {**_WINDOW, "head_dim": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
}


def config_of(name: str, **changes: Any) -> Any:
    model_type, differences = FAMILIES[name]
    return CONFIG_MAPPING[model_type](**{**_SHAPE, **differences, **changes})


def build(name: str, **changes: Any) -> PreTrainedModel:
    """Random weights whose updates outweigh what they are added to, so that greedy tokens are decided and keep
    changing; biases and norms included: a zero bias or a norm of ones would hide that it is ignored.
    """
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    model = AutoModelForCausalLM.from_config(
        config_of(name, **changes), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ends = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.3 if id(parameter) in ends else 1.5 / parameter.shape[-1] ** 0.5))
    return model

"""Configurations of families that transformers knows only as code in a model's folder, which is never run here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Fields of InternLM2's own class that mean what Llama's of the same name do. ``bias`` is the other one that counts.
_AS_LLAMA = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def foreign_config(fields: Mapping[str, Any]) -> PretrainedConfig | None:
    """What config.json says, as the class of transformers whose model computes the same; None: it has one of its own.

    Raises what that class raises.
    """
    if fields.get("model_type") != "internlm2":
        return None
    from transformers import LlamaConfig

    shared = {name: fields[name] for name in _AS_LLAMA if name in fields}
    config = LlamaConfig(**shared, attention_bias=fields.get("bias", True))
    config.update({"model_type": "internlm2"})  # by which our families are told
    return config

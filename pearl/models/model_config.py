"""The decoder's shape, read from a transformers configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.plain_files import PlainConfig, plain_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True)
class _Family:
    qkv_bias: bool | None = None  # None: what the configuration's attention_bias says
    output_bias: bool | None = None
    qk_norm: bool = False


# CodeLlama and DeepSeek-Coder are Llama shapes.
FAMILIES: Mapping[str, _Family] = {
    "LlamaForCausalLM": _Family(),
    "MistralForCausalLM": _Family(qkv_bias=False, output_bias=False),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, output_bias=False),
    "Qwen3ForCausalLM": _Family(qk_norm=True),
}


@dataclass(frozen=True)
class ModelConfig:
    """``windows[i]`` is layer i's sliding window, 0 for full attention. ``vocab_size`` may include padding."""

    architecture: str
    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    eps: float
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...]
    max_position_embeddings: int
    rope: Mapping[str, Any] = field(hash=False)  # rope_type, rope_theta and the type's own parameters
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_pretrained(cls, path: str) -> ModelConfig:
        """Read ``config.json`` of a local folder or a hub id. Raises ModelLoadError or UnsupportedModelError."""
        if (plain := plain_config(path)) is not None:
            return cls.from_transformers(plain)
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(
                f"no model configuration could be read from {path!r}: give a folder with a config.json, "
                f"or a hub id that is reachable or cached ({_first_line(error)})"
            ) from error
        return cls.from_transformers(config)

    @classmethod
    def from_transformers(cls, config: PretrainedConfig | PlainConfig) -> ModelConfig:
        architecture = (config.architectures or [type(config).__name__])[0]
        family = FAMILIES.get(architecture)
        if family is None:
            raise UnsupportedModelError(
                f"{architecture} is not supported; the decoder knows {', '.join(sorted(FAMILIES))}"
            )
        if config.hidden_act != "silu":
            raise UnsupportedModelError(f"activation {config.hidden_act!r} is not supported; the decoder knows 'silu'")
        attention_bias = bool(getattr(config, "attention_bias", False))
        dtype = config.dtype if config.dtype in _DTYPES else torch.float32
        return cls(
            architecture=architecture,
            vocab_size=config.vocab_size,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            ffn=config.intermediate_size,
            eps=config.rms_norm_eps,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            output_bias=attention_bias if family.output_bias is None else family.output_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            qk_norm=family.qk_norm,
            windows=_windows(config),
            max_position_embeddings=config.max_position_embeddings,
            rope=_rope(config),
            dtype=dtype,
        )


def _windows(config: PretrainedConfig | PlainConfig) -> tuple[int, ...]:
    window: int = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # Mistral: all layers; Llama has no window
        layers: int = config.num_hidden_layers
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


def _rope(config: PretrainedConfig | PlainConfig) -> dict[str, Any]:
    """One form for transformers 5's rope_parameters and the older rope_theta with rope_scaling."""
    parameters = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    parameters["rope_type"] = parameters.get("rope_type") or parameters.pop("type", None) or "default"
    if parameters.get("rope_theta") is None:
        parameters["rope_theta"] = getattr(config, "rope_theta", None) or 10000.0
    return parameters


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]

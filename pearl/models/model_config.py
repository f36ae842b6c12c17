"""The decoder's shape, read from a transformers configuration."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models.config_file import check_sizes
from pearl.models.families import Family, Norms, QKNorm, family_of
from pearl.models.model_source import source_of
from pearl.models.quantization import Quantization
from pearl.models.rope import frequencies, longest_fixed, require_fixed_frequencies

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pearl.models.plain_files import PlainConfig

_ACTIVATIONS = ("silu", "swish")  # two names of one function
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 4096


@dataclass(frozen=True)
class ModelConfig:
    """``windows[i]`` is layer i's sliding window, 0 for full attention. ``vocab_size`` may include padding.

    What is set apart below is neutral in Llama.
    """

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
    qk_norm: QKNorm
    windows: tuple[int, ...]
    max_position_embeddings: int
    rope: Mapping[str, Any] = field(hash=False)  # rope_type, rope_theta and the type's own parameters
    dtype: torch.dtype = torch.float32
    quantization: Quantization | None = None  # of its checkpoint

    norms: Norms = "before"
    norm_offset: float = 0.0  # joins the stored weights of norms when they are loaded
    merged_projections: bool = False  # as they are stored
    unrotated: int = 0  # the last so many lanes of a head pass the rotation by
    # One for each layer, where they differ; None: the layer is not rotated.
    layer_ropes: tuple[Mapping[str, Any] | None, ...] = field(default=(), hash=False)
    query_scale: float | None = None  # of attention scores; None: head_dim ** -0.5
    attention_softcap: float = 0.0  # 0: none
    residual_multiplier: float = 1.0  # of what each sublayer adds to the residual, which we keep divided by it

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    @property
    def residual_eps(self) -> float:
        """For norms of the residual r / m, m = residual_multiplier: norm(r) with eps is norm(r / m) with eps / m^2."""
        return self.eps / self.residual_multiplier**2

    @property
    def rotary_dim(self) -> int:
        return self.head_dim - self.unrotated

    @property
    def longest(self) -> int:
        """Positions up to which the model was made and can be run exactly."""
        lengths = (longest_fixed(rope, self.max_position_embeddings) for rope in self._ropes())
        return min(self.max_position_embeddings, *lengths)

    def rope_of(self, layer: int) -> Mapping[str, Any] | None:
        """None: the layer's queries and keys are not rotated."""
        return self.layer_ropes[layer] if self.layer_ropes else self.rope

    def _ropes(self) -> list[Mapping[str, Any]]:
        return [self.rope, *(rope for rope in self.layer_ropes if rope is not None)]

    @classmethod
    def from_pretrained(cls, path: str, dtype: torch.dtype | None = None) -> ModelConfig:
        """Of a model as ``source_of`` takes it. dtype: to compute in; None: what the checkpoint says.

        Raises ModelLoadError or UnsupportedModelError; each names the field and its value.
        """
        source = source_of(path)
        quantization = source.quantization()
        config = source.config()
        with source.naming():
            shape = cls.from_transformers(config)
            return replace(shape, dtype=dtype or source.dtype(), quantization=quantization)

    @classmethod
    def from_transformers(cls, config: PretrainedConfig | PlainConfig) -> ModelConfig:
        """The shape that transformers' own class would have. Raises ModelLoadError or UnsupportedModelError.

        Windows are those that the family's class uses: Mistral's sliding_window, and for Qwen2, Qwen3 and Ministral
        the layers of layer_types. Llama's class ignores such a key, and so do we: attention is full. transformers'
        ``generate`` cuts the cache by it all the same: it differs from its own class unless use_cache=False.
        """
        config = copy.deepcopy(config)
        family = family_of({"model_type": config.model_type})
        check_sizes(vars(config))
        config.standardize_rope_params()  # as the model's class does: some keys count only now
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        attention_bias = bool(getattr(config, "attention_bias", False))
        shape = cls(
            architecture=family.architecture,
            vocab_size=config.vocab_size,
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            ffn=config.intermediate_size,
            eps=config.rms_norm_eps,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            output_bias=attention_bias if family.output_bias is None else family.output_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias,
            qk_norm=family.qk_norm,
            windows=_windows(config, family),
            max_position_embeddings=config.max_position_embeddings,
            rope=dict(config.rope_parameters),
            dtype=config.dtype if config.dtype in _DTYPES else torch.float32,
            norms=family.norms,
            norm_offset=family.norm_offset,
            merged_projections=family.merged_projections,
            unrotated=head_dim - _rotary_dim(config.rope_parameters, family, head_dim),
            layer_ropes=_layer_ropes(config),
        )
        shape._check(config.hidden_act)
        return shape

    def require_length(self, max_model_len: int) -> None:
        """ConfigurationError if the model cannot be run exactly on that many positions."""
        for rope in self._ropes():
            require_fixed_frequencies(rope, self.max_position_embeddings, max_model_len)

    def _check(self, activation: object) -> None:
        if activation not in _ACTIVATIONS:
            raise UnsupportedModelError(
                f"activation {activation!r} (hidden_act) is not supported; the decoder knows 'silu'"
            )
        if self.heads % self.kv_heads:
            raise ModelLoadError(
                f"num_attention_heads={self.heads} is not a multiple of num_key_value_heads={self.kv_heads}"
            )
        if self.head_dim % 2 or not 2 <= self.head_dim <= _MAX_HEAD_DIM:
            raise ModelLoadError(
                f"head_dim (hidden_size / num_attention_heads where it is not given) must be even and from 2 to "
                f"{_MAX_HEAD_DIM}, not {self.head_dim}"
            )
        if not 0 <= self.eps < math.inf:
            raise ModelLoadError(f"rms_norm_eps must be a finite number >= 0, not {self.eps!r}")
        for rope in self._ropes():
            frequencies(rope, self.rotary_dim, self.max_position_embeddings)


def _rotary_dim(rope: Mapping[str, Any], family: Family, head_dim: int) -> int:
    """How many lanes of a head are rotated. Classes that rotate all ignore the factor where nothing is scaled."""
    factor = rope.get("partial_rotary_factor", 1.0)
    if factor == 1.0 or (not family.partial_rotary and rope["rope_type"] == "default"):
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


def _layer_ropes(config: PretrainedConfig | PlainConfig) -> tuple[Mapping[str, Any] | None, ...]:
    """Empty where all layers are alike. SmolLM3 has layers without rope: 0 in no_rope_layers."""
    rotated = getattr(config, "no_rope_layers", None)
    if config.model_type != "smollm3" or rotated is None:
        return ()
    layers = config.num_hidden_layers
    if len(rotated) < layers or not all(isinstance(each, int) for each in rotated):
        raise ModelLoadError(f"no_rope_layers must have a 0 or 1 for each of the {layers} layers, not {rotated!r}")
    return tuple(dict(config.rope_parameters) if each else None for each in rotated[:layers])


def _windows(config: PretrainedConfig | PlainConfig, family: Family) -> tuple[int, ...]:
    layers: int = config.num_hidden_layers
    if family.windows == "none":
        return (0,) * layers
    window: int | None = config.sliding_window
    if family.windows == "all":
        return (0 if window is None else _checked_window(window),) * layers
    return tuple(_window_of(kind, window) for kind in config.layer_types)


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

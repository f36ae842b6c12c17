"""The decoder's shape, read from a transformers configuration."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from pearl.errors import ModelLoadError, UnsupportedModelError
from pearl.models import config_features as features
from pearl.models.config_features import Activation
from pearl.models.config_file import check_sizes
from pearl.models.draft_vocabulary import REDUCED_SIZE
from pearl.models.families import Norms, QKNorm, family_of
from pearl.models.mixture import Mixture, read_mixture
from pearl.models.model_files import checked_integer
from pearl.models.model_source import source_of
from pearl.models.quantization import Quantization
from pearl.models.rope import frequencies, longest_fixed, require_fixed_frequencies

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pearl.models.plain_files import PlainConfig

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
    reduced_vocab: int = 0  # ids that a draft can say, see draft_vocabulary; 0: all
    borrows_embedding: bool = False  # its target's, as its files have none: the target's ids, and its hidden size

    norms: Norms = "before"
    norm_offset: float = 0.0  # joins the stored weights of norms when they are loaded
    merged_projections: bool = False  # as they are stored
    grouped_qkv: bool = False  # so too: see Family
    stored_names: Mapping[str, str] = field(default_factory=dict, hash=False)
    mixture: Mixture | None = None  # of experts; None: all layers are dense
    unrotated: int = 0  # the last so many lanes of a head pass the rotation by
    # One for each layer, where they differ; None: the layer is not rotated.
    layer_ropes: tuple[Mapping[str, Any] | None, ...] = field(default=(), hash=False)
    query_scale: float | None = None  # of attention scores; None: head_dim ** -0.5
    attention_softcap: float = 0.0  # 0: none
    sinks: bool = False  # of attention: a logit of each query head that only the denominators know of
    activation: Activation = "silu"
    logits_scale: float = 1.0
    logits_softcap: float = 0.0  # 0: none
    embedding_scale: float = 1.0
    rounds_embedding_scale: bool = False  # to the dtype that is computed in
    residual_multiplier: float = 1.0  # of what each sublayer adds to the residual, which we keep divided by it

    def mixture_of(self, layer: int) -> Mixture | None:
        """None: the layer is dense."""
        return self.mixture if self.mixture is not None and self.mixture.sparse[layer] else None

    @property
    def attention_scale(self) -> float:
        return self.head_dim**-0.5 if self.query_scale is None else self.query_scale

    def embedding_factor(self, dtype: torch.dtype) -> float:
        """What makes an embedding the first residual, as we keep it, of a model that is computed in dtype."""
        scale = self.embedding_scale
        if self.rounds_embedding_scale:
            scale = torch.tensor(scale).to(dtype).item()
        return scale / self.residual_multiplier

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
            if shape.reduced_vocab and quantization is not None:
                raise UnsupportedModelError(
                    f"{REDUCED_SIZE} is not supported in a quantised model; take the unquantised one"
                )
            if shape.grouped_qkv and quantization is not None:
                raise UnsupportedModelError(
                    f"a quantised {shape.architecture} ({quantization.method.name}) is not supported: its queries, "
                    "keys and values are one matrix, whose bits are not taken apart; take the unquantised checkpoint"
                )
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
        features.refuse_unknown(config, family)
        config.standardize_rope_params()  # as the model's class does: some keys count only now
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        attention_bias = bool(getattr(config, family.attention_bias, False))
        rope, multipliers = features.rope(config, family), features.multipliers(config, family)
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
            reduced_vocab=_reduced_vocab(config),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            output_bias=attention_bias if family.output_bias is None else family.output_bias,
            mlp_bias=bool(getattr(config, "mlp_bias", False)) if family.mlp_bias is None else family.mlp_bias,
            qk_norm=family.qk_norm,
            windows=features.windows(config, family),
            max_position_embeddings=config.max_position_embeddings,
            rope=rope,
            dtype=config.dtype if config.dtype in _DTYPES else torch.float32,
            norms=family.norms,
            norm_offset=family.norm_offset,
            merged_projections=family.merged_projections,
            grouped_qkv=family.grouped_qkv,
            stored_names=family.stored_names,
            mixture=None if family.mixture is None else read_mixture(config, family.mixture),
            unrotated=head_dim - features.rotary_dim(rope, family, head_dim),
            layer_ropes=features.layer_ropes(config, family),
            query_scale=features.query_scale(config, family),
            attention_softcap=features.softcap(config, "attn_logit_softcapping", family.attention_softcap),
            sinks=family.sinks,
            activation=features.activation(config, family),
            logits_scale=multipliers.logits,
            logits_softcap=features.softcap(config, "final_logit_softcapping", family.softcaps),
            embedding_scale=multipliers.embedding,
            rounds_embedding_scale=family.scales_embeddings,
            residual_multiplier=multipliers.residual,
        )
        shape._check()
        return shape

    def require_length(self, max_model_len: int) -> None:
        """ConfigurationError if the model cannot be run exactly on that many positions."""
        for rope in self._ropes():
            require_fixed_frequencies(rope, self.max_position_embeddings, max_model_len)

    def _check(self) -> None:
        if self.heads % self.kv_heads:
            raise ModelLoadError(
                f"num_attention_heads={self.heads} is not a multiple of num_key_value_heads={self.kv_heads}"
            )
        if self.head_dim % 2 or not 2 <= self.head_dim <= _MAX_HEAD_DIM:
            raise ModelLoadError(
                f"head_dim (hidden_size / num_attention_heads where it is not given) must be even and from 2 to "
                f"{_MAX_HEAD_DIM}, not {self.head_dim}"
            )
        if self.mixture is not None and self.activation != "silu":
            raise UnsupportedModelError(
                f"a mixture of experts with the activation {self.activation!r} is not supported; known is 'silu'"
            )
        if not 0 <= self.eps < math.inf:
            raise ModelLoadError(f"rms_norm_eps must be a finite number >= 0, not {self.eps!r}")
        for rope in self._ropes():
            frequencies(rope, self.rotary_dim, self.max_position_embeddings)


def _reduced_vocab(config: PretrainedConfig | PlainConfig) -> int:
    value = getattr(config, REDUCED_SIZE, None)
    return 0 if value is None else checked_integer(REDUCED_SIZE, value, most=config.vocab_size)

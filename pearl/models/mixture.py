"""Which layers of a model are mixtures of experts, and their shape, read from a transformers configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pearl.errors import ModelLoadError
from pearl.models.model_files import checked_integer
from pearl_kernels import GatedUnit

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from pearl.models.plain_files import PlainConfig


SWIGLU = GatedUnit()


@dataclass(frozen=True)
class MixtureFields:
    """Which fields of a family's configuration say what; "": none does."""

    hidden: str = "moe_intermediate_size"
    renormalise: str = "norm_topk_prob"  # "": weights always add up to 1
    shared: str = ""
    dense_layers: bool = False  # decoder_sparse_step and mlp_only_layers count
    clamped: bool = False  # swiglu_alpha and swiglu_limit count, and 1 is added to the up part
    biases: bool = False
    interleaved: bool = False


@dataclass(frozen=True)
class Mixture:
    """Of a model's sparse layers: ``experts`` of feed-forward width ``hidden``, of which a token meets ``top_k``.

    ``sparse``: for each layer, whether it is one of them; others have the model's own feed-forward layer.
    ``shared``: width of the expert that all tokens meet, scaled by a gate of its own; 0: there is none.
    ``renormalise``: whether the weights of a token's experts add up to 1.
    ``unit``: what makes one of an expert's gate and up parts.
    ``biases``: whether routers and experts have some.
    ``interleaved``: stacks of all experts hold gates and ups in turns (``stored_experts``).
    """

    experts: int
    top_k: int
    hidden: int
    sparse: tuple[bool, ...]
    renormalise: bool = True
    shared: int = 0
    unit: GatedUnit = SWIGLU
    biases: bool = False
    interleaved: bool = False

    @property
    def layers(self) -> int:
        """Sparse ones."""
        return sum(self.sparse)

    def expected_experts(self, rows: float) -> float:
        """Of a layer, that ``rows`` tokens meet, if each meets any of them with the same probability."""
        missed: float = (1 - self.top_k / self.experts) ** rows
        return self.experts * (1 - missed)


def read_mixture(config: PretrainedConfig | PlainConfig, fields: MixtureFields) -> Mixture | None:
    """None: all layers are dense. Raises ModelLoadError with the field's name."""
    layers: int = config.num_hidden_layers
    experts = _number(config, "num_local_experts" if hasattr(config, "num_local_experts") else "num_experts", 0)
    if experts == 0:
        return None
    sparse = _sparse_layers(config, layers) if fields.dense_layers else (True,) * layers
    if not any(sparse):
        return None
    top_k = _number(config, "num_experts_per_tok", 1)
    if top_k > experts:
        raise ModelLoadError(f"num_experts_per_tok={top_k} is more than the {experts} experts that there are")
    return Mixture(
        experts=experts,
        top_k=top_k,
        hidden=_number(config, fields.hidden, 1),
        sparse=sparse,
        renormalise=not fields.renormalise or bool(getattr(config, fields.renormalise)),
        shared=_number(config, fields.shared, 1) if fields.shared else 0,
        unit=_clamped_unit(config) if fields.clamped else SWIGLU,
        biases=fields.biases,
        interleaved=fields.interleaved,
    )


def _sparse_layers(config: Any, layers: int) -> tuple[bool, ...]:
    """Every decoder_sparse_step-th, but for those in mlp_only_layers."""
    step, dense = _number(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None) or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ModelLoadError(f"mlp_only_layers must be a list of numbers of layers, not {dense!r}")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def _clamped_unit(config: Any) -> GatedUnit:
    """gpt-oss's; what older configurations leave out are its class's constants."""
    return GatedUnit(_positive(config, "swiglu_alpha", 1.702), _positive(config, "swiglu_limit", 7.0), 1.0)


def _positive(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelLoadError(f"{name} must be a finite number above 0, not {value!r}")
    return float(value)


def _number(config: Any, name: str, least: int) -> int:
    return checked_integer(name, getattr(config, name, None), least)

"""Which folders hold a head, and what it is: read from config.json, checked against the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from pearl.errors import ConfigurationError, ModelLoadError, UnsupportedModelError
from pearl.models import ModelConfig
from pearl.models.backend import DescribedModel
from pearl.models.config_file import check_sizes, made_by_transformers, naming_config
from pearl.models.hub import fetch_description
from pearl.models.model_files import checked_integer, is_gguf, read_json_if_there
from pearl.models.quantization import read_quantization
from pearl.models.weight_files import CONFIG

_MOST_HEADS = 64  # of Medusa, and of a head's blocks
_AUX = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class EagleConfig:
    """An EAGLE-3 head (arXiv 2503.01840). ``shape``: of its one layer and its KV, with the target's vocabulary."""

    shape: ModelConfig
    hidden_layers: tuple[int, ...]  # of the target that it reads, see ``pearl.models.hidden_states``
    target_hidden: int
    draft_vocab: int  # ids that it can draft
    norm_before_residual: bool  # whether the residual stream begins with the normed feature

    name = "an EAGLE-3 head"

    @property
    def elements(self) -> int:
        """Numbers in its weights, but for norms and an embedding of its own."""
        shape, d = self.shape, self.shape.hidden
        q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        layer = 2 * d * (q + 2 * kv) + q * d + 3 * d * shape.ffn
        return len(self.hidden_layers) * self.target_hidden * d + layer + self.draft_vocab * d

    @property
    def step_elements(self) -> int:
        """Of those, what drafting one token reads."""
        return self.elements


@dataclass(frozen=True)
class MedusaConfig:
    """Medusa heads (arXiv 2401.10774): head i drafts the token i + 2 behind the one whose state it reads.

    shape: no layers, and the target's hidden size and vocabulary.
    """

    shape: ModelConfig
    hidden_layers: tuple[int, ...]
    heads: int
    blocks: int  # residual ones of each head

    name = "a set of Medusa heads"

    @property
    def target_hidden(self) -> int:
        return self.shape.hidden

    @property
    def elements(self) -> int:
        return self.heads * self.step_elements

    @property
    def step_elements(self) -> int:
        d = self.shape.hidden
        return self.blocks * d * (d + 1) + d * self.shape.vocab_size


HeadConfig = EagleConfig | MedusaConfig
HeadKind = Literal["eagle3", "medusa"]
HEAD_NAMES: Mapping[HeadKind, str] = {"eagle3": EagleConfig.name, "medusa": MedusaConfig.name}


def head_kind(path: str) -> HeadKind | None:
    """Of what a local folder or a hub id holds; None if it is no head. Raises as ``read_head``."""
    return _fields_and_kind(path)[1]


def lone_head(path: str) -> HeadKind | None:
    """As ``head_kind``, and None of Medusa heads that lie beside the weights of the model that they were trained in."""
    fields, kind = _fields_and_kind(path)
    return kind if kind == "eagle3" or fields.get("model_type") in (None, "medusa") else None


def _fields_and_kind(path: str) -> tuple[Mapping[str, Any], HeadKind | None]:
    if is_gguf(path):
        return {}, None
    fields = read_json_if_there(fetch_description(path) / CONFIG)
    with naming_config(path):
        return fields, _kind(fields)


def read_head(path: str, target: DescribedModel) -> HeadConfig:
    """The head of a folder that holds one, to be run in the target's dtype.

    Raises ModelLoadError or UnsupportedModelError for one that cannot be run, ConfigurationError for another target's.
    """
    folder = fetch_description(path)
    fields = read_json_if_there(folder / CONFIG)
    if read_quantization(folder) is not None:
        raise UnsupportedModelError(f"{path} is a quantised head, which is not supported; take the unquantised one")
    with naming_config(path):
        return _medusa(fields, target) if _kind(fields) == "medusa" else _eagle(fields, target)


def require_same(name: str, field: str, own: int, targets: int) -> None:
    """ConfigurationError if a head or a draft was not made for such a target."""
    if own != targets:
        raise ConfigurationError(
            f"draft is {name} made for a target with {field}={own}, this one has {targets}; choose one that was "
            "trained for this target"
        )


def _kind(fields: Mapping[str, Any]) -> HeadKind | None:
    names = [str(name).lower() for name in _listed(fields, "architectures") or ()]
    if "medusa_num_heads" in fields or fields.get("model_type") == "medusa" or any("medusa" in n for n in names):
        return "medusa"
    eagle3 = fields.get("speculators_model_type") == "eagle3" or any("eagle3" in name for name in names)
    if eagle3 or "draft_vocab_size" in fields or "eagle_config" in fields:
        return "eagle3"
    if any("eagle" in name for name in names) or str(fields.get("speculators_model_type", "")).startswith("eagle"):
        raise UnsupportedModelError(
            f"architectures {fields.get('architectures')} are an EAGLE head of the first or second kind, which is not "
            "supported; take an EAGLE-3 head that was trained for this target"
        )
    return None


def _eagle(fields: Mapping[str, Any], target: DescribedModel) -> EagleConfig:
    own = _object(fields, "eagle_config")
    if own.get("use_aux_hidden_state") is False or own.get("parallel_drafting") or fields.get("parallel_drafting"):
        raise UnsupportedModelError(f"EAGLE-3 heads with eagle_config={own!r} are not supported")
    shape = _llama(_object(fields, "transformer_layer_config") or fields)
    if shape.layers != 1:
        raise UnsupportedModelError(f"an EAGLE-3 head has one layer, num_hidden_layers is {shape.layers}")
    name = EagleConfig.name
    require_same(name, "vocab_size", shape.vocab_size, target.vocab_size)
    field = "hidden_size" if fields.get("target_hidden_size") is None else "target_hidden_size"
    target_hidden = shape.hidden if field == "hidden_size" else checked_integer(field, fields[field])
    require_same(name, field, target_hidden, target.hidden)
    draft_vocab = fields.get("draft_vocab_size") or shape.vocab_size
    return EagleConfig(
        shape=replace(shape, architecture=name, dtype=target.dtype),
        hidden_layers=_layers(fields, own, target),
        target_hidden=target_hidden,
        draft_vocab=checked_integer("draft_vocab_size", draft_vocab, most=target.vocab_size),
        norm_before_residual=bool(fields.get("norm_before_residual")),
    )


def _layers(fields: Mapping[str, Any], own: Mapping[str, Any], target: DescribedModel) -> tuple[int, ...]:
    """Before which of the target's layers the residual stream is read: 2, the middle one and the last but two, as
    EAGLE's own code does, if the configuration does not say it. There are two spellings: vLLM's names those layers at
    the top level, SGLang's, in eagle_config, the layers before them.
    """
    count = target.layers
    layers: Sequence[Any] = (2, count // 2, count - 3)
    if (named := _listed(fields, _AUX)) is not None:
        layers = named
    elif (before := _listed(own, _AUX)) is not None:
        layers = [layer + 1 for layer in before if isinstance(layer, int)]
    whole = all(isinstance(layer, int) and 0 <= layer < count for layer in layers)
    if not whole or len(set(layers)) != 3:
        raise ModelLoadError(
            f"an EAGLE-3 head reads three of the target's {count} layers, not {tuple(layers)}; name others in {_AUX}"
        )
    return tuple(sorted(layers))


def _medusa(fields: Mapping[str, Any], target: DescribedModel) -> MedusaConfig:
    heads = checked_integer("medusa_num_heads", fields.get("medusa_num_heads"), most=_MOST_HEADS)
    blocks = checked_integer("medusa_num_layers", fields.get("medusa_num_layers", 1), most=_MOST_HEADS)
    for field, targets in (("hidden_size", target.hidden), ("vocab_size", target.vocab_size)):
        if fields.get(field) is not None:
            require_same(MedusaConfig.name, field, fields[field], targets)
    return MedusaConfig(_shape_without_layers(target), (target.layers,), heads, blocks)


def _shape_without_layers(target: DescribedModel) -> ModelConfig:
    """A size of heads it has all the same, which operators are chosen by."""
    return ModelConfig(
        MedusaConfig.name, target.vocab_size, target.hidden, 0, target.kv_heads, target.kv_heads, target.head_dim,
        target.hidden, eps=0.0, tied=False, qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm="none",
        windows=(), max_position_embeddings=target.longest, rope={"rope_type": "default"}, dtype=target.dtype,
    )  # fmt: skip


def _llama(fields: Mapping[str, Any]) -> ModelConfig:
    """The layer's shape, as transformers would read it of a Llama."""
    from transformers import LlamaConfig

    if fields.get("model_type", "llama") != "llama":
        raise UnsupportedModelError(f"an EAGLE-3 head of model_type {fields['model_type']!r} is not supported")
    check_sizes(fields)
    for name in ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"):
        if fields.get(name) is None:
            raise ModelLoadError(f"{name} is missing")
    with made_by_transformers():
        config = LlamaConfig(**{**fields, "dtype": torch.float32, "torch_dtype": None})
    return ModelConfig.from_transformers(config)


def _object(fields: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """{} if it is not there."""
    value = fields.get(name) or {}
    if not isinstance(value, Mapping):
        raise ModelLoadError(f"{name} must be an object, not {value!r}")
    return value


def _listed(fields: Mapping[str, Any], name: str) -> Sequence[Any] | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, list | tuple):
        raise ModelLoadError(f"{name} must be a list, not {value!r}")
    return value

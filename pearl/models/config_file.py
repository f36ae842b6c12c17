"""Reads config.json: transformers' configuration object, or a sentence that names the field that is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pearl.errors import ModelLoadError, PearlError, UnsupportedModelError
from pearl.models.config_features import require_one_for_each_layer
from pearl.models.families import family_of
from pearl.models.foreign_config import foreign_config
from pearl.models.model_files import checked_integer, read_json
from pearl.models.plain_files import PlainConfig, plain_config
from pearl.models.rope import check_parameters
from pearl.models.weight_files import CONFIG

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings",
)  # fmt: skip
_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 10_000  # transformers and the decoder keep a list of them


def read_config(path: str, folder: Path) -> tuple[Mapping[str, Any], PretrainedConfig | PlainConfig]:
    """What a folder's config.json says, and transformers' configuration made of it. ``path``: what errors call it.

    Its dtype is left to ``model_dtype``. No code of the folder is run. Raises ModelLoadError or UnsupportedModelError.
    """
    if not (folder / CONFIG).exists():
        raise ModelLoadError(
            f"{path!r} has no {CONFIG}: give a folder with a model's configuration and weights, or a GGUF file by its "
            "own name (of the hub: repository:file.gguf)"
        )
    values = read_json(folder / CONFIG)
    if (plain := plain_config(str(folder))) is not None:
        return values, plain
    from transformers import AutoConfig, PretrainedConfig

    with naming_config(path), made_by_transformers():
        fields = PretrainedConfig.get_config_dict(folder)[0]
        _check(fields)
        if (foreign := foreign_config(fields)) is not None:
            return fields, foreign
        # A dtype that is given is the only one that transformers does not refuse for its name.
        return fields, AutoConfig.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)


@contextmanager
def made_by_transformers(kind: type[ModelLoadError | UnsupportedModelError] = ModelLoadError) -> Iterator[None]:
    """What transformers raises over a configuration becomes an error of a kind, in a sentence."""
    try:
        yield
    except PearlError:
        raise
    except Exception as error:  # transformers' validation raises whatever a wrong value runs into
        raise kind(f"transformers refuses it: {_reason(error)}") from error


@contextmanager
def naming_config(path: str) -> Iterator[None]:
    """Errors raised inside say whose config.json is wrong."""
    try:
        yield
    except (ModelLoadError, UnsupportedModelError) as error:
        raise type(error)(f"{path}/{CONFIG}: {error}") from error


def check_sizes(fields: Mapping[str, Any]) -> None:
    """ModelLoadError unless the sizes that are there are integers that a tensor can have."""
    for name in _SIZES:
        if fields.get(name) is not None:
            checked_integer(name, fields[name], most=_MAX_LAYERS if name == "num_hidden_layers" else _MAX_SIZE)


def _check(fields: Mapping[str, Any]) -> None:
    """What transformers would not refuse, or not by the field's name."""
    family = family_of(fields)
    check_sizes(fields)
    if not isinstance(fields.get("layer_types", []), list | None):
        raise ModelLoadError(f"layer_types must be a list with a name for each layer, not {fields['layer_types']!r}")
    rotated, layers = fields.get("no_rope_layers"), fields.get("num_hidden_layers")
    if family.layers_without_rope and rotated is not None and isinstance(layers, int):
        require_one_for_each_layer(rotated, layers)
    if fields.get("per_layer_config"):
        raise UnsupportedModelError("layers that differ (per_layer_config) are not supported")
    rope = fields.get("rope_scaling") or fields.get("rope_parameters")
    if isinstance(rope, Mapping) and family.local_rope and any(isinstance(value, Mapping) for value in rope.values()):
        for own in rope.values():
            if isinstance(own, Mapping):
                check_parameters(own)
    elif isinstance(rope, Mapping):
        kind = rope.get("rope_type", rope.get("type", "default"))
        known = family.rope_types.get(kind) if isinstance(kind, str) else None
        check_parameters(rope if known is None else {**rope, "rope_type": known})


def _reason(error: Exception) -> str:
    """A validation's message in one line, in words of JSON, without the validator's name and its second guesses."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error).strip()
    text = re.sub(r"^(Class v|V)alidation error for [^\n]*\n\s*(\w+Error: )?", "", text)
    text = re.sub(r"\. Errors: .*", "", text, flags=re.DOTALL)
    text = re.sub(r"must be in \([^)]*\) but got", "are not all known:", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("NoneType", "null")
    return " ".join(text.split())[:400] or type(error).__name__

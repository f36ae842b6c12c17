"""Whether transformers' own module of a model can run on our pages: found out without its weights."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch

from pearl.errors import ModelLoadError, PearlError, UnsupportedModelError
from pearl.models.config_file import made_by_transformers, naming_config
from pearl.models.draft_vocabulary import REDUCED_SIZE
from pearl.models.hub import fetch_description
from pearl.models.model_dtype import checkpoint_dtype
from pearl.models.model_files import first_line, is_gguf, read_json
from pearl.models.quantization import read_quantization
from pearl.models.transformers_backend.config import TransformersConfig
from pearl.models.transformers_backend.interface import TRACED, positions, register
from pearl.models.transformers_backend.trace import Trace, trace
from pearl.models.weight_files import CONFIG

# Types of layers (layer_types) that carry a state from token to token.
_RECURRENT = re.compile(r"linear|conv|mamba|ssm|recurrent|rwkv|delta|hybrid", re.IGNORECASE)


def describe(path: str, dtype: torch.dtype | None = None) -> TransformersConfig:
    """The shape of a model in a local folder or under a hub id. dtype: to compute in; None: what the checkpoint says.

    transformers' class is built on the meta device and run once, without a number. No code of the folder is run.
    Raises UnsupportedModelError, which says what cannot be run exactly, or ModelLoadError.
    """
    if is_gguf(path):
        raise UnsupportedModelError(f"{path} is a GGUF file, which only the native decoder reads; take its safetensors")
    folder = fetch_description(path)
    fields = read_json(folder / CONFIG)
    if (quantization := read_quantization(folder)) is not None:
        raise UnsupportedModelError(
            f"{path} is quantised with {quantization.method.name}, which only the native decoder reads; take the "
            "unquantised checkpoint"
        )
    if fields.get(REDUCED_SIZE) is not None:
        raise UnsupportedModelError(
            f"{path} has a {REDUCED_SIZE}, which only the native decoder runs; take a draft with all ids"
        )
    with naming_config(path):
        config = read(folder)
        _refuse_by_configuration(config)
        longest = _positions(config)
        model = _build(config)
        if getattr(model, "_is_stateful", False):
            raise _carries_state(f"transformers' {type(model).__name__}")
        found = _trace(model)
        _require_every_layer(config, type(model).__name__, found)
        known = min(found.vocab_size, model.get_input_embeddings().weight.shape[0])
        return TransformersConfig(
            architecture=type(model).__name__,
            vocab_size=known,
            known_ids=known,
            attention=found.attention,
            max_position_embeddings=longest,
            dtype=dtype or checkpoint_dtype(path, fields),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            hidden=found.hidden,
        )


def read(folder: Path) -> Any:
    """transformers' configuration of a folder. Raises ModelLoadError or UnsupportedModelError."""
    from transformers import AutoConfig

    try:
        with made_by_transformers(UnsupportedModelError):
            return AutoConfig.from_pretrained(folder, trust_remote_code=False, dtype=torch.float32)
    except UnsupportedModelError as error:
        if read_json(folder / CONFIG).get("auto_map"):
            raise UnsupportedModelError(
                "transformers does not have this model; it is defined by Python code in the model's folder (auto_map), "
                "and this engine never runs code from there"
            ) from error
        raise


def _refuse_by_configuration(config: Any) -> None:
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError("it has an encoder, or attention to one: only causal language models run here")
    if config.get_text_config() is not config:
        raise UnsupportedModelError("it is a model of more than text; only causal language models of text run here")
    if recurrent := [kind for kind in getattr(config, "layer_types", None) or () if _RECURRENT.search(str(kind))]:
        raise _carries_state(f"a layer of type {recurrent[0]!r}")


def _carries_state(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{what} carries a state from token to token (recurrent, convolution or linear attention), which cannot be "
        "rolled back when drafted tokens are rejected; only attention over all tokens' keys and values runs here"
    )


def _build(config: Any) -> Any:
    """transformers' causal LM of a configuration, without weights, its attention TRACED."""
    from transformers import AutoModelForCausalLM

    register()
    options: dict[str, Any] = {"attn_implementation": TRACED, "dtype": torch.float32, "trust_remote_code": False}
    options["experts_implementation"] = "batched_mm"  # of its ways the one whose shapes do not depend on numbers
    build: Any = AutoModelForCausalLM.from_config
    try:
        with torch.device("meta"):
            return build(_with_fixed_rotations(config), **options).eval()
    except Exception as error:  # a class without the attention interface fails in many ways, from its registries on
        raise UnsupportedModelError(
            f"transformers' class of model_type {config.model_type!r} cannot run on KV pages: its attention does not "
            f"go through transformers' attention interface, or config.json contradicts itself ({_what(error)})"
        ) from error


def _trace(model: Any) -> Trace:
    try:
        with torch.inference_mode():
            return trace(model)
    except PearlError as error:
        raise type(error)(f"transformers' {type(model).__name__} cannot run on KV pages: {error}") from error
    except Exception as error:  # the module's own code, which may want numbers, or a mask of its own form
        raise UnsupportedModelError(
            f"transformers' {type(model).__name__} cannot run on KV pages: its attention, or its mask or biases, do "
            f"not go through transformers' attention interface ({_what(error)})"
        ) from error


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _require_every_layer(config: Any, name: str, found: Trace) -> None:
    layers = getattr(config, "num_hidden_layers", None)
    if len(found.attention) != layers:
        raise UnsupportedModelError(
            f"transformers' {name} cannot run on KV pages: it has {layers} layers, of which {len(found.attention)} "
            "attend through transformers' attention interface"
        )


def _positions(config: Any) -> int:
    """As many as give each token the same result in whatever batch it is computed."""
    longest = positions(config)
    if not longest:
        raise ModelLoadError("it has no max_position_embeddings, by which the length of a text could be bounded")
    for rope in _rope_parameters(config):
        if rope.get("rope_type") == "longrope":  # beyond that length transformers turns all of a batch by others
            longest = min(longest, int(rope["original_max_position_embeddings"]))
    return longest


def _with_fixed_rotations(config: Any) -> Any:
    """Without the scalings that look at the numbers of positions; within ``_positions`` they are fixed, too."""
    config = copy.deepcopy(config)
    for rope in _rope_parameters(config):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            rope["rope_type"] = "default"
    return config


def _rope_parameters(config: Any) -> list[Any]:
    """The one, or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]

"""Refuses checkpoints whose matrices are not stored as plain numbers: cast as they are they would be garbage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pearl.errors import UnsupportedModelError
from pearl.models.model_files import read_json_if_there
from pearl.models.weight_files import CONFIG

HF_QUANT_CONFIG = "hf_quant_config.json"  # ModelOpt's
_PLAIN = {"F64", "F32", "F16", "BF16"}  # safetensors' names
# What quantisers store beside a matrix, or in its place: last parts of tensors' names.
_COMPANIONS = {
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_packed", "weight_shape",
    "input_scale", "activation_scale", "qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format", "absmax",
    "quant_map", "nested_absmax", "nested_quant_map", "codebooks", "codes",
}  # fmt: skip
_ADVICE = (
    "quantised checkpoints are not supported yet; use the unquantised one that it was made from (and "
    'target_weights="int8" or draft_weights="int8" on CPU)'
)


def refuse_quantized(folder: Path) -> None:
    """Raises UnsupportedModelError with the method's name if a model's description says that it is quantised."""
    settings = read_json_if_there(folder / CONFIG)
    for key in ("quantization_config", "compression_config"):  # the second: compressed-tensors, at first
        if settings.get(key):
            raise _refusal(f"{folder} is quantised with {_method(settings[key])} ({key} of its {CONFIG})")
    quantization = read_json_if_there(folder / HF_QUANT_CONFIG).get("quantization")
    algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else quantization
    if algorithm:  # without one only the KV cache is meant
        raise _refusal(f"{folder} is quantised with ModelOpt's {algorithm} ({HF_QUANT_CONFIG})")


def refuse_quantized_tensors(folder: Path, needed: Mapping[str, str], others: Iterable[str]) -> None:
    """As above, by what the files hold. ``needed``: safetensors' name of the dtype of each tensor that the decoder
    reads; ``others``: names of what else lies under its layers and head.
    """
    for name, dtype in needed.items():
        if dtype not in _PLAIN:
            raise _refusal(f"{folder} is quantised: {name!r} is stored as {dtype}, not in F32, F16 or BF16")
    for name in others:
        if name.rsplit(".", 1)[-1] in _COMPANIONS:
            raise _refusal(f"{folder} is quantised: {name!r} belongs to a quantised matrix")


def _method(settings: Any) -> str:
    """What the quantiser calls itself, with the format where it has several."""
    if not isinstance(settings, dict):
        return repr(settings)
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_8bit") or settings.get("load_in_4bit")):
        method = "bitsandbytes"
    if method is None:
        return "a method that has no name"
    kind = settings.get("format") or settings.get("fmt") or settings.get("quant_algo") or _bits(settings)
    return f"{method} ({kind})" if kind else str(method)


def _bits(settings: Mapping[str, Any]) -> str:
    for key, bits in (("load_in_8bit", 8), ("load_in_4bit", 4), ("bits", settings.get("bits"))):
        if settings.get(key):
            return f"{bits} bits"
    return ""


def _refusal(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{what}; {_ADVICE}")

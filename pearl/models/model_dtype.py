"""The dtype that a checkpoint is computed in where the user asks for none, as transformers chooses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pearl.errors import ModelLoadError
from pearl.models.hub import fetch_weights
from pearl.models.weight_files import weight_files

# float64 is computed in the widest that the kernels have.
_NAMES = {
    "float32": torch.float32, "float": torch.float32, "float64": torch.float32, "double": torch.float32,
    "bfloat16": torch.bfloat16, "float16": torch.float16, "half": torch.float16,
}  # fmt: skip
_STORED = {"F64": torch.float32, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def checkpoint_dtype(path: str, fields: Mapping[str, Any]) -> torch.dtype:
    """What config.json declares; where it says nothing or "auto", what the weights of ``path`` are stored in.

    Raises ModelLoadError for a dtype that the decoder does not compute in.
    """
    value = fields["dtype"] if fields.get("dtype") is not None else fields.get("torch_dtype")
    if isinstance(value, Mapping):  # one for each part of a model, "" for all others
        value = value.get("", "float32")
    if value is None or value == "auto":
        return _stored_dtype(path) or torch.float32
    if not isinstance(value, str) or value not in _NAMES:
        raise ModelLoadError(
            f"dtype {value!r} is not supported; known are {', '.join(_NAMES)} and auto; or give dtype= yourself"
        )
    return _NAMES[value]


def _stored_dtype(path: str) -> torch.dtype | None:
    """Of the first floating-point tensor in the first file; None where there is none that the loader could read."""
    try:
        file = weight_files(fetch_weights(path))[0]
        with safe_open(file, framework="pt") as tensors:
            stored = (tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118 not a dict
            return next((_STORED[dtype] for dtype in stored if dtype in _STORED), None)
    except (ModelLoadError, OSError, SafetensorError):
        return None  # the loader says what is wrong with the weights

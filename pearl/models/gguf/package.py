"""The package ``gguf``: which types of tensors there are, and what their numbers are."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pearl.errors import ConfigurationError, UnsupportedModelError


@dataclass(frozen=True)
class TensorType:
    """Blocks of ``numbers`` neighbours of a row, stored in ``size`` bytes each."""

    name: str
    code: int
    numbers: int
    size: int

    def row_bytes(self, numbers: int) -> int:
        return numbers // self.numbers * self.size


def tensor_type(code: int) -> TensorType | None:
    """The type with a number of ggml; None if there is none. ConfigurationError where the package is missing."""
    constants = _package().constants
    try:
        kind = constants.GGMLQuantizationType(code)
        numbers, size = constants.GGML_QUANT_SIZES[kind]
    except (KeyError, ValueError):
        return None
    return TensorType(kind.name, code, numbers, size)


def require_decodable(kind: TensorType, tensor: str) -> None:
    """UnsupportedModelError with the tensor's name unless ``decode`` can."""
    try:
        decode(np.zeros((1, kind.size), np.uint8), kind)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{tensor!r} is {error}") from error


def decode(rows: NDArray[np.uint8], kind: TensorType) -> NDArray[np.float32]:
    """The numbers of rows of blocks ``[R, bytes]``, fp32 ``[R, N]``. UnsupportedModelError: the package cannot."""
    package = _package()
    try:
        numbers: NDArray[np.float32] = package.quants.dequantize(
            rows, package.constants.GGMLQuantizationType(kind.code)
        )
    except NotImplementedError as error:  # a type of which the package has no Python code
        raise UnsupportedModelError(
            f"stored as {kind.name}, which cannot be decoded; take a file of another type, such as Q8_0, Q4_K_M or BF16"
        ) from error
    return numbers


def _package() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigurationError(
            "GGUF files need the package gguf: pip install 'pearl-engine[gguf]', or take the model's safetensors"
        ) from error

"""Matrices whose blocks are integers with a scale, and maybe an offset, for 32 inputs: kept in their few bits.

The layouts are ggml's (ggml-common.h, ggml-quants.c).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pearl.models.quantization import Quantization
from pearl.models.quantization_methods import Method
from pearl.models.quantized_storage import WEIGHT, Bits, Part, Shape
from pearl_kernels import QuantizedMatrix

_GROUP = 32
_BITS: Mapping[str, Bits] = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4}
KEPT = _BITS.keys()
_HEAD = "lm_head"
# Of one input, and so loaded as one matrix: they are kept only if all of them can be, in as many bits.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class BlockStorage:
    """See ``Storage``. A matrix is one tensor, whose rows of blocks are ``[M, bytes]``, uint8."""

    kind: str
    is_fp8: bool = False

    @property
    def keeps_bits(self) -> Bits:
        return _BITS[self.kind]

    @property
    def offsets(self) -> bool:
        return self.kind in ("Q4_1", "Q4_K")

    @property
    def names(self) -> frozenset[str]:
        return frozenset({WEIGHT})

    def group_of(self, inputs: int) -> int:
        return _GROUP

    def parts(self, outputs: int, inputs: int, stored: Collection[str]) -> Mapping[str, Part]:
        shapes: tuple[Shape, ...] = ((outputs, inputs),)
        return {WEIGHT: Part(shapes, frozenset({self.kind}))}

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedMatrix:
        rows = tensors[WEIGHT].numpy()
        values, scale, offset = {"Q8_0": _q8_0, "Q4_0": _q4, "Q4_1": _q4, "Q4_K": _q4_k}[self.kind](rows, self.offsets)
        groups = (outputs, inputs // _GROUP)
        return QuantizedMatrix(
            torch.from_numpy(values).view(outputs, inputs),
            torch.from_numpy(scale).view(groups),
            None if offset is None else torch.from_numpy(offset).view(groups),
            _GROUP,
            self.keeps_bits,
        )


def kept_matrices(kinds: Mapping[str, str]) -> Quantization | None:
    """kinds: of all tensors, by the names of their modules. None: no matrix is kept in few bits."""
    bits = {module: _BITS.get(kind) for module, kind in kinds.items() if module.endswith("_proj") or module == _HEAD}
    storages = {
        module: BlockStorage(kinds[module])
        for module, own in bits.items()
        if own is not None and all(bits.get(each) == own for each in _partners(module))
    }
    if not storages:
        return None
    name = f"GGUF ({', '.join(sorted({storage.kind for storage in storages.values()}))})"
    return Quantization(Method(name, next(iter(storages.values()))), frozenset(storages), storages)


def _partners(module: str) -> list[str]:
    """All that are loaded as one matrix with it."""
    prefix, _, last = module.rpartition(".")
    together = next((group for group in _TOGETHER if last in group), (last,))
    return [f"{prefix}.{each}" for each in together] if prefix else [module]


_Parts = tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32] | None]


def _q8_0(rows: NDArray[np.uint8], offsets: bool) -> _Parts:
    """A scale, 32 integers."""
    blocks = rows.reshape(-1, 34)
    return np.ascontiguousarray(blocks[:, 2:].view(np.int8)), _floats(blocks[:, :2]), None


def _q4(rows: NDArray[np.uint8], offsets: bool) -> _Parts:
    """A scale, with ``offsets`` what is added to ``u * scale`` (else ``(u - 8) * scale`` is meant), 32 integers u."""
    blocks = rows.reshape(-1, 20 if offsets else 18)
    scale = _floats(blocks[:, :2])
    offset = _floats(blocks[:, 2:4]) + 8 * scale if offsets else None
    return _nibbles(blocks[:, 4 if offsets else 2 :]), scale, offset


def _q4_k(rows: NDArray[np.uint8], offsets: bool) -> _Parts:
    """Two scales, of 8 groups' scales and minima in 6 bits each, those in 12 bytes, then four times 64 integers."""
    blocks = rows.reshape(-1, 144)
    of_scales, of_minima = _floats(blocks[:, :2]), _floats(blocks[:, 2:4])
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((low & 63, (high & 15) | (low >> 6 << 4)), 1)
    minima = np.concatenate((middle & 63, (high >> 4) | (middle >> 6 << 4)), 1)
    scale = of_scales * scales.astype(np.float32)
    return _nibbles(blocks[:, 16:].reshape(-1, 32)), scale, 8 * scale - of_minima * minima.astype(np.float32)


def _nibbles(octets: NDArray[np.uint8]) -> NDArray[np.int8]:
    """``[B, n]`` to ``[B, 2n]``: all lower halves of a block, then all upper ones, less 8."""
    values: NDArray[np.int8] = np.concatenate((octets & 15, octets >> 4), 1).astype(np.int8) - np.int8(8)
    return values


def _floats(octets: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(octets).view("<f2").astype(np.float32)

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

from pearl.models.merged_storage import stored_alike
from pearl.models.quantization import Quantization
from pearl.models.quantization_methods import Method
from pearl.models.quantized_storage import WEIGHT, Bits, FewBits, Part, Shape
from pearl_kernels import QuantizedMatrix

_GROUP = 32
_BITS: Mapping[str, Bits] = {"Q8_0": 8, "Q4_0": 4, "Q4_1": 4, "Q4_K": 4}
KEPT = _BITS.keys()
_HEAD = "lm_head"


@dataclass(frozen=True)
class BlockStorage:
    """See ``Storage``. A matrix is one tensor, whose rows of blocks are ``[M, bytes]``, uint8."""

    kind: str
    ordered: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset({WEIGHT})

    def few_bits(self, inputs: int) -> FewBits:
        return FewBits(_BITS[self.kind], _GROUP, offsets=self.kind in ("Q4_1", "Q4_K"))

    def parts(self, outputs: int, inputs: int, stored: Collection[str]) -> Mapping[str, Part]:
        shapes: tuple[Shape, ...] = ((outputs, inputs),)
        return {WEIGHT: Part(shapes, frozenset({self.kind}))}

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedMatrix:
        rows = tensors[WEIGHT].numpy()
        kept = self.few_bits(inputs)
        values, scale, offset = {"Q8_0": _q8_0, "Q4_0": _q4, "Q4_1": _q4, "Q4_K": _q4_k}[self.kind](rows, kept.offsets)
        groups = (outputs, inputs // _GROUP)
        return QuantizedMatrix(
            torch.from_numpy(values).view(outputs, inputs),
            torch.from_numpy(scale).view(groups),
            None if offset is None else torch.from_numpy(offset).view(groups),
            _GROUP,
            kept.bits,
        )


def block_quantization(kinds: Mapping[str, str]) -> Quantization | None:
    """kinds: of all tensors, by the names of their modules. None: no matrix can be kept in few bits."""
    matrices = [module for module in kinds if module.endswith("_proj") or module == _HEAD]
    found = {module: BlockStorage(kinds[module]) for module in matrices if kinds[module] in KEPT}
    kept = stored_alike({module: found[module].few_bits(0) if module in found else None for module in matrices})
    storages = {module: found[module] for module in kept}
    if not storages:
        return None
    name = f"GGUF ({', '.join(sorted({storage.kind for storage in storages.values()}))})"
    return Quantization(Method(name, next(iter(storages.values()))), frozenset(storages), storages)


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

"""How MXFP4 matrices lie in gpt-oss's files (OCP Microscaling formats 1.0); see ``quantized_storage``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.models.quantized_storage import FewBits, Part
from pearl_kernels import QuantizedMatrix

_BYTES = frozenset({"U8"})
_GROUP = 32
# What each four bits stand for (E2M1: a sign, two bits of exponent, one of mantissa), twice: so all are integers.
_TWICE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
_EXPONENT_OF_HALF = 128  # scales are powers of two, stored as their exponent plus 127


@dataclass(frozen=True)
class Mxfp4Storage:
    """``weight_blocks`` has an input's number in the lower half of a byte and the next one's in the upper,
    ``weight_scales`` the exponent of 32 inputs' scale.

    The numbers have no form of four bits here: they are held as integers of eight, which is exact.
    """

    ordered: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"weight_blocks", "weight_scales"})

    def few_bits(self, inputs: int) -> FewBits:
        return FewBits(8, _GROUP, offsets=False)

    def parts(self, outputs: int, inputs: int, stored: Collection[str]) -> Mapping[str, Part]:
        groups = -(-inputs // _GROUP)
        return {
            "weight_blocks": Part(((outputs, groups, _GROUP // 2),), _BYTES),
            "weight_scales": Part(((outputs, groups),), _BYTES),
        }

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedMatrix:
        octets = tensors["weight_blocks"].reshape(outputs, -1)
        nibbles = torch.stack((octets & 15, octets >> 4), -1).flatten(-2)[:, :inputs]
        values = torch.tensor(_TWICE, dtype=torch.int8)[nibbles.int()]
        exponents = tensors["weight_scales"].to(torch.int32) - _EXPONENT_OF_HALF
        scale = torch.ldexp(torch.ones(exponents.shape, dtype=torch.float64), exponents).float()
        return QuantizedMatrix(values, scale, None, _GROUP, 8)

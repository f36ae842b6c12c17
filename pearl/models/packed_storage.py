"""How integers of 4 or 8 bits lie in 32-bit words, several to a word; see ``quantized_storage``.

Sources: AutoGPTQ's and AutoAWQ's packing, compressed-tensors' pack-quantized.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.errors import ModelLoadError
from pearl.models.quantized_storage import ACTIVATION_SCALES, FLOATS, Bits, FewBits, Part, Scales
from pearl_kernels import QuantizedMatrix
from pearl_kernels.reference import dequantize

_INT32 = frozenset({"I32"})
_WORD = 32  # bits
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word in which its i-th column lies


@dataclass(frozen=True)
class PackedStorage:
    """compressed-tensors' pack-quantized: integers plus 2^(bits-1) in 32-bit words along the inputs, zero points along
    the outputs. ``ordered``: groups may be those of ``weight_g_idx``.
    """

    bits: Bits
    scales: Scales
    symmetric: bool
    ordered: bool

    @property
    def names(self) -> frozenset[str]:
        own = {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx"}
        return ACTIVATION_SCALES | own

    def few_bits(self, inputs: int) -> FewBits:
        return FewBits(self.bits, self.scales.group_of(inputs), offsets=not self.symmetric)

    def parts(self, outputs: int, inputs: int, stored: Collection[str]) -> Mapping[str, Part]:
        groups = -(-inputs // self.scales.group_of(inputs))
        parts = {
            "weight_packed": Part(((outputs, -(-inputs * self.bits // _WORD)),), _INT32),
            "weight_scale": Part(self.scales.shapes(outputs, inputs), FLOATS),
            "weight_shape": Part(((2,),), frozenset({"I64", "I32"})),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = Part(((-(-outputs * self.bits // _WORD), groups),), _INT32)
        if self.ordered:
            parts["weight_g_idx"] = Part(((inputs,),), _INT32, required=False)
        return parts

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedMatrix | Tensor:
        if (shape := tensors["weight_shape"].tolist()) != [outputs, inputs]:
            raise ModelLoadError(f"weight_shape says {shape}, its config.json calls for {[outputs, inputs]}")
        values = unpack(tensors["weight_packed"], self.bits)[:, :inputs]
        scale = self.scales.of_rows(tensors["weight_scale"], outputs)
        zero = None
        if not self.symmetric:
            zero = unpack(tensors["weight_zero_point"].T, self.bits)[:, :outputs].T
        return _with_zeros(values, scale, zero, self.scales.group_of(inputs), self.bits, tensors.get("weight_g_idx"))


@dataclass(frozen=True)
class GptqStorage:
    """``qweight`` packs inputs, ``qzeros`` outputs; ``group`` -1: all inputs. ``zero_shift``: what a stored zero point
    lacks, 1 in the first version of the format. ``ordered``: inputs may belong to any group (act-order).
    """

    bits: Bits
    group: int
    symmetric: bool
    ordered: bool
    zero_shift: int

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def few_bits(self, inputs: int) -> FewBits:
        return FewBits(self.bits, _group(self.group, inputs), offsets=not self.symmetric)

    def parts(self, outputs: int, inputs: int, stored: Collection[str]) -> Mapping[str, Part]:
        words, groups = _WORD // self.bits, -(-inputs // _group(self.group, inputs))
        return {
            "qweight": Part(((-(-inputs // words), outputs),), _INT32),
            "qzeros": Part(((groups, -(-outputs // words)),), _INT32),
            "scales": Part(((groups, outputs),), FLOATS),
            "g_idx": Part(((inputs,),), _INT32, required=self.ordered),
        }

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedMatrix | Tensor:
        values = unpack(tensors["qweight"].T, self.bits)[:, :inputs]
        zero = unpack(tensors["qzeros"], self.bits)[:, :outputs].T + self.zero_shift & (1 << self.bits) - 1
        scale = tensors["scales"].float().T.contiguous()
        return _with_zeros(values, scale, zero, _group(self.group, inputs), self.bits, tensors.get("g_idx"))


@dataclass(frozen=True)
class AwqStorage:
    """4 bits with zero points; words pack outputs, in an order of their own."""

    group: int
    ordered: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset({"qweight", "qzeros", "scales"})

    def few_bits(self, inputs: int) -> FewBits:
        return FewBits(4, _group(self.group, inputs), offsets=True)

    def parts(self, outputs: int, inputs: int, stored: Collection[str]) -> Mapping[str, Part]:
        groups = -(-inputs // _group(self.group, inputs))
        return {
            "qweight": Part(((inputs, -(-outputs // 8)),), _INT32),
            "qzeros": Part(((groups, -(-outputs // 8)),), _INT32),
            "scales": Part(((groups, outputs),), FLOATS),
        }

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedMatrix | Tensor:
        values, zero = (_in_order(unpack(tensors[name], 4))[:, :outputs].T for name in ("qweight", "qzeros"))
        scale = tensors["scales"].float().T.contiguous()
        return _with_zeros(values, scale, zero, _group(self.group, inputs), 4, None)


def in_order(group_index: Tensor, group: int) -> bool:
    """Whether each input's group is the one that its place says."""
    return torch.equal(group_index.long(), torch.arange(len(group_index)) // group)


def _group(setting: int, inputs: int) -> int:
    return inputs if setting == -1 else setting


def unpack(words: Tensor, bits: Bits) -> Tensor:
    """uint8 ``[R, C * 32 / bits]`` of int32 ``[R, C]``: the numbers of each word, from the lowest bits on."""
    # Flat first: of one word in a row torch may keep a transposed one's strides, and then views no bytes.
    octets = words.reshape(-1).view(torch.uint8).view(words.shape[0], -1)
    return octets if bits == 8 else torch.stack((octets & 15, octets >> 4), -1).flatten(-2)


def _in_order(nibbles: Tensor) -> Tensor:
    return nibbles.view(nibbles.shape[0], -1, 8)[..., _AWQ_ORDER].flatten(1)


def _with_zeros(
    values: Tensor, scale: Tensor, zero: Tensor | None, group: int, bits: Bits, group_index: Tensor | None
) -> QuantizedMatrix | Tensor:
    """``(values - zero) * scale`` for uint8 ``[M, K]``, scale and zero ``[M, G]``; no zero is one of 2^(bits-1).

    ``group_index``: the group of each input, if it may be another than its place says.
    """
    middle = 1 << bits - 1
    centred = (values.to(torch.int16) - middle).to(torch.int8).contiguous()
    offset = None if zero is None else (middle - zero.float()) * scale
    if offset is not None and not offset.any():
        offset = None
    if group_index is None or in_order(group_index, group):
        return QuantizedMatrix(centred, scale, offset, group, bits)
    if not 0 <= int(group_index.min()) <= int(group_index.max()) < scale.shape[1]:
        raise ModelLoadError(f"an input's group (g_idx) is not from 0 to {scale.shape[1] - 1}")
    index = group_index.long()
    return dequantize(QuantizedMatrix(centred, scale[:, index], None if offset is None else offset[:, index], 1, bits))

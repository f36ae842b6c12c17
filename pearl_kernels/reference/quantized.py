"""A matrix of few-bit numbers, however a checkpoint stored it: the one description that every method is read into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedMatrix:
    """``[M, K]``: in fp32 ``w[m, k] = values[m, k] * scale[m, k // group] + offset[m, k // group]``.

    values: ``[M, K]``, int8 (in [-8, 7] where ``bits`` is 4) or float8_e4m3fn. scale, offset: fp32 ``[M, G]`` with
    ``G = ceil(K / group)``; no offset is one of 0. A zero point z of unsigned integers u, ``(u - z) * s``, is an
    offset: ``(u - 8) * s + (8 - z) * s`` with 4 bits. Raises ValueError if they do not fit together.
    """

    values: Tensor
    scale: Tensor
    offset: Tensor | None
    group: int
    bits: Literal[4, 8]

    def __post_init__(self) -> None:
        if self.values.dim() != 2 or self.group < 1:
            raise ValueError(f"a quantised matrix of shape {list(self.values.shape)} in groups of {self.group}")
        allowed = (torch.int8,) if self.bits == 4 else (torch.int8, torch.float8_e4m3fn)
        if self.values.dtype not in allowed:
            raise ValueError(
                f"values of {self.bits} bits must be {' or '.join(map(str, allowed))}, not {self.values.dtype}"
            )
        outputs, inputs = self.values.shape
        shape = (outputs, -(-inputs // self.group))
        for name, tensor in (("scale", self.scale), ("offset", self.offset)):
            if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape != shape):
                raise ValueError(f"{name} must be torch.float32 {list(shape)}, not {tensor.dtype} {list(tensor.shape)}")

    def to(self, device: torch.device) -> QuantizedMatrix:
        offset = None if self.offset is None else self.offset.to(device)
        return QuantizedMatrix(self.values.to(device), self.scale.to(device), offset, self.group, self.bits)


def _alike(one: QuantizedMatrix, other: QuantizedMatrix) -> bool:
    """Whether they can be one matrix: inputs, groups and numbers of one kind."""
    return (one.values.shape[1], one.group, one.bits, one.values.dtype) == (
        other.values.shape[1], other.group, other.bits, other.values.dtype,
    )  # fmt: skip


def stack_outputs(matrices: Sequence[QuantizedMatrix], offsets: bool = False) -> QuantizedMatrix:
    """One's outputs after the other's, with offsets where one has them, or always. ValueError unless all are alike."""
    first = matrices[0]
    if not all(_alike(first, matrix) for matrix in matrices):
        raise ValueError("matrices of other inputs, groups or numbers cannot be one")
    offset = None
    if offsets or any(matrix.offset is not None for matrix in matrices):
        offset = torch.cat([torch.zeros_like(m.scale) if m.offset is None else m.offset for m in matrices])
    values, scale = (torch.cat([getattr(m, name) for m in matrices]) for name in ("values", "scale"))
    return QuantizedMatrix(values, scale, offset, first.group, first.bits)


def take_outputs(matrix: QuantizedMatrix, rows: Tensor) -> QuantizedMatrix:
    """The outputs ``rows``, int64, in that order."""
    values = matrix.values.view(torch.int8)[rows].view(matrix.values.dtype)  # eight bits, whatever they mean
    offset = None if matrix.offset is None else matrix.offset[rows]
    return QuantizedMatrix(values, matrix.scale[rows], offset, matrix.group, matrix.bits)


def dequantize(matrix: QuantizedMatrix) -> Tensor:
    """The numbers that are meant, fp32 ``[M, K]``."""
    inputs = matrix.values.shape[1]

    def of_inputs(groups: Tensor) -> Tensor:
        return groups.repeat_interleave(matrix.group, 1)[:, :inputs] if groups.shape[1] > 1 else groups

    numbers = matrix.values.float() * of_inputs(matrix.scale)
    return numbers if matrix.offset is None else numbers + of_inputs(matrix.offset)

"""linear and experts with weights of few bits in groups, for the rows of decoding steps and windows.

The rival gets the same numbers decoded to x's dtype; the bytes are those of the few bits, for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.kernel_bench import Bench, Call, Contender, close, plain, rival
from bench.kernels.test_kernel_experts import torch_experts
from pearl_kernels import QuantizedMatrix
from pearl_kernels.reference import dequantize


@dataclass(frozen=True)
class Format:
    bits: Literal[4, 8]
    group: int
    offsets: bool = False

    def __str__(self) -> str:
        return f"int{self.bits} in {self.group}s" + " with offsets" * self.offsets

    def matrix(self, bench: Bench, outputs: int, inputs: int) -> QuantizedMatrix:
        low, groups, device = -(1 << self.bits - 1), -(-inputs // self.group), bench.device
        values = torch.randint(low, -low, (outputs, inputs), dtype=torch.int8, device=device)
        scale = torch.rand(outputs, groups, device=device) * inputs**-0.5 / -low
        offset = torch.randn(outputs, groups, device=device) * inputs**-0.5 if self.offsets else None
        return QuantizedMatrix(values, scale, offset, self.group, self.bits)

    def bytes(self, outputs: int, inputs: int) -> int:
        return outputs * (inputs * self.bits // 8 + -(-inputs // self.group) * 4 * (1 + self.offsets))


@dataclass(frozen=True)
class Product:
    rows: int
    format: Format
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.in_features} @ {self.in_features}x{self.out_features}, {self.format}"


@dataclass(frozen=True)
class Mixture:
    rows: int
    format: Format
    experts: int
    top_k: int
    width: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.top_k} of {self.experts} experts of {self.width}x{self.hidden}, {self.format}"


FORMATS = (Format(4, 32), Format(4, 128, True), Format(8, 128))
PRODUCTS = {
    "tiny": [Product(3, Format(4, 32, True), 64, 72)],
    "small": [Product(rows, format, 2048, 2048) for format in FORMATS for rows in (1, 2, 4, 8)],
    "real": [
        Product(rows, format, *matrix)
        for matrix in ((2048, 8192), (4096, 4096))
        for format in FORMATS
        for rows in range(1, 9)
    ],
}
MIXTURES = {
    "tiny": [Mixture(3, Format(8, 32), 4, 2, 64, 32)],
    "small": [Mixture(rows, FORMATS[0], 32, 4, 1024, 512) for rows in (1, 4, 8)],
    "real": [
        Mixture(rows, format, *shape)
        for shape in ((128, 8, 2048, 768), (8, 2, 4096, 14336))
        for format in FORMATS
        for rows in (1, 2, 4, 8)
    ],
}


def decoded_linear(x: Tensor, weight: QuantizedMatrix) -> Call:
    decoded = dequantize(weight).to(x.dtype)
    return lambda: F.linear(x, decoded)


def decoded_experts(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Sequence[QuantizedMatrix], down: Sequence[QuantizedMatrix]
) -> Call:
    stacks = (torch.stack([dequantize(matrix).to(x.dtype) for matrix in stack]) for stack in (gate_up, down))
    return plain(torch_experts)(x, experts, weights, *stacks)


def same_result(result: Tensor, expected: Tensor, *_: Any) -> None:
    close(result, expected)


@pytest.mark.kernel("linear", shapes=PRODUCTS, rivals=[rival("F.linear, decoded", decoded_linear)])
def test_quantized_linear(bench: Bench, shape: Product, contender: Contender) -> None:
    def make() -> tuple[Any, ...]:
        weight = shape.format.matrix(bench, shape.out_features, shape.in_features)
        return bench.randn(shape.rows, shape.in_features), weight

    weights = shape.format.bytes(shape.out_features, shape.in_features)
    moved = weights + shape.rows * (shape.in_features + shape.out_features) * bench.dtype.itemsize
    bench.measure(contender, "linear", shape, make, moved, same_result, streams=weights)


RIVAL = rival("a loop of F.linear, decoded", decoded_experts, capturable=False)


@pytest.mark.kernel("experts", shapes=MIXTURES, rivals=[RIVAL])
def test_quantized_experts(bench: Bench, shape: Mixture, contender: Contender) -> None:
    """Routing is even and random; the bytes are those of the experts that it chose."""
    chosen = torch.rand(shape.rows, shape.experts).argsort(-1)[:, : shape.top_k].int()
    chosen = chosen.contiguous().to(bench.device)
    up, down = (2 * shape.hidden, shape.width), (shape.width, shape.hidden)

    def make() -> tuple[Any, ...]:
        stacks = ([shape.format.matrix(bench, *matrix) for _ in range(shape.experts)] for matrix in (up, down))
        weights = torch.full((shape.rows, shape.top_k), 1 / shape.top_k, device=bench.device)
        return bench.randn(shape.rows, shape.width), chosen, weights, *stacks

    read = len(set(chosen.flatten().tolist())) * (shape.format.bytes(*up) + shape.format.bytes(*down))
    moved = read + 2 * shape.rows * shape.width * bench.dtype.itemsize
    bench.measure(contender, "experts", shape, make, moved, same_result, streams=read)

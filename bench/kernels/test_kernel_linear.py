"""linear on CPU: the matrices of the bundled target, and larger ones, beside torch's. On CUDA it is torch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.kernel_bench import Bench, Contender, close, plain, rival


@dataclass(frozen=True)
class Product:
    rows: int
    in_features: int
    out_features: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.in_features} @ {self.in_features}x{self.out_features}"


BUNDLED = ((384, 640), (384, 384), (384, 2304), (1152, 384), (384, 4096))  # qkv, output, gate and up, down, head
LARGER = ((2048, 2048), (2048, 8192), (4096, 4096))
SHAPES = {
    "tiny": [Product(3, 40, 72)],
    "small": [Product(rows, *matrix) for matrix in (*BUNDLED, *LARGER[:2]) for rows in (1, 8)],
    "real": [Product(rows, *matrix) for matrix in (*BUNDLED, *LARGER) for rows in (1, 2, 4, 8, 16)],
}


def same_result(result: Tensor, expected: Tensor, *_: Any) -> None:
    close(result, expected)


@pytest.mark.kernel(
    "linear",
    shapes=SHAPES,
    dtypes=(torch.bfloat16, torch.float32),
    rivals=[rival("F.linear", plain(F.linear))],
)
def test_linear(bench: Bench, shape: Product, contender: Contender) -> None:
    """On CUDA the engine calls torch's own product, which is then measured alone: it is most of a forward's bytes."""

    def make() -> tuple[Any, ...]:
        weight = bench.randn(shape.out_features, shape.in_features) * shape.in_features**-0.5
        return bench.randn(shape.rows, shape.in_features), weight

    size = bench.dtype.itemsize
    weights = shape.in_features * shape.out_features * size
    moved = weights + shape.rows * (shape.in_features + shape.out_features) * size
    bench.measure(contender, "linear", shape, make, moved, same_result, streams=weights)

"""A mixture's experts for the rows of a decoding step or a window: the chosen experts' weights beside the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.kernel_bench import Bench, Contender, close, plain, rival


@dataclass(frozen=True)
class Mixture:
    rows: int
    experts: int
    top_k: int
    width: int
    hidden: int

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.top_k} of {self.experts} experts of {self.width}x{self.hidden}"


QWEN3, MIXTRAL = (128, 8, 2048, 768), (8, 2, 4096, 14336)  # of 30B-A3B and of 8x7B
SHAPES = {
    "tiny": [Mixture(3, 4, 2, 40, 24)],
    "small": [Mixture(rows, 32, 4, 1024, 512) for rows in (1, 4, 8)],
    "real": [Mixture(rows, *shape) for shape in (QWEN3, MIXTRAL) for rows in (1, 2, 4, 8, 16)],
}


def torch_experts(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """As transformers writes it: expert by expert, each with its rows."""
    out = torch.zeros_like(x)
    for expert in experts.unique().tolist():  # type: ignore[no-untyped-call]
        token, place = torch.where(experts == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        made = F.linear(F.silu(gate) * up, down[expert]) * weights[token, place, None]
        out.index_add_(0, token, made.to(out.dtype))
    return out


def same_result(result: Tensor, expected: Tensor, *_: Any) -> None:
    close(result, expected)


@pytest.mark.kernel(
    "experts",
    shapes=SHAPES,
    dtypes=(torch.bfloat16,),
    rivals=[rival("a loop of F.linear", plain(torch_experts), capturable=False)],
)
def test_experts(bench: Bench, shape: Mixture, contender: Contender) -> None:
    """Routing is even and random; the bytes are those of the experts that it chose."""
    chosen = torch.rand(shape.rows, shape.experts).argsort(-1)[:, : shape.top_k].int()
    chosen = chosen.contiguous().to(bench.device)

    def make() -> tuple[Any, ...]:
        gate_up = bench.randn(shape.experts, 2 * shape.hidden, shape.width) * shape.width**-0.5
        down = bench.randn(shape.experts, shape.width, shape.hidden) * shape.hidden**-0.5
        weights = torch.full((shape.rows, shape.top_k), 1 / shape.top_k, device=bench.device)
        return bench.randn(shape.rows, shape.width), chosen, weights, gate_up, down

    read = len(set(chosen.flatten().tolist())) * 3 * shape.width * shape.hidden * bench.dtype.itemsize
    moved = read + 2 * shape.rows * shape.width * bench.dtype.itemsize
    bench.measure(contender, "experts", shape, make, moved, same_result, streams=read)

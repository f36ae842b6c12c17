"""rms_norm, add_rms_norm, silu_and_mul, rope_and_cache and copy_blocks beside torch's own operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.kernel_bench import HEAD_DIM, Bench, Contender, close, plain, rival

EPS = 1e-5
MAX_POSITION = 8192


@dataclass(frozen=True)
class Rows:
    rows: int
    width: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.width}"


@dataclass(frozen=True)
class Heads:
    rows: int
    query_heads: int
    kv_heads: int

    def __str__(self) -> str:
        return f"{self.rows} rows {self.query_heads}+2*{self.kv_heads} heads"


@dataclass(frozen=True)
class Pages:
    pairs: int
    pages: int

    def __str__(self) -> str:
        return f"{self.pairs} of {self.pages} pages"


HIDDEN = {
    "tiny": [Rows(3, 96)],
    "small": [Rows(1, 4096), Rows(8, 4096)],
    "real": [Rows(1, 4096), Rows(8, 4096), Rows(128, 4096)],
}
FEED_FORWARD = {
    "tiny": [Rows(3, 80)],
    "small": [Rows(1, 14336), Rows(8, 14336)],
    "real": [Rows(1, 14336), Rows(8, 14336), Rows(128, 14336)],
}
HEADS = {
    "tiny": [Heads(3, 4, 2)],
    "small": [Heads(1, 32, 8), Heads(8, 32, 8)],
    "real": [Heads(1, 32, 8), Heads(8, 32, 8), Heads(128, 32, 8)],
}
PAGES = {
    "tiny": [Pages(2, 8)],
    "small": [Pages(1, 4096), Pages(64, 4096)],
    "real": [Pages(1, 65536), Pages(64, 65536), Pages(1024, 65536)],
}


def torch_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[1],), weight, eps)


def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    residual += x
    return F.rms_norm(residual, (x.shape[1],), weight, eps)


def torch_silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def torch_rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> None:
    """As transformers writes it, ``x * cos + rotate_half(x) * sin``, and an indexed store."""
    cos, sin = (half.repeat(1, 2).unsqueeze(1).to(q.dtype) for half in cos_sin[positions].chunk(2, dim=-1))

    def rotated(x: Tensor) -> Tensor:
        left, right = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-right, left), dim=-1) * sin

    q.copy_(rotated(q))
    k_cache.flatten(0, 1).index_copy_(0, slot_mapping, rotated(k))
    v_cache.flatten(0, 1).index_copy_(0, slot_mapping, v)


def torch_copy_blocks(cache: Tensor, pairs: Tensor) -> None:
    cache[pairs[:, 1]] = cache[pairs[:, 0]]


def same_result(result: Tensor, expected: Tensor, *_: Any) -> None:
    close(result, expected)


def same_arguments(result: Any, expected: Any, mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    """What is returned, and what was changed in place."""
    if expected is not None:
        close(result, expected)
    for here, there in zip(mine, theirs, strict=True):
        if isinstance(here, Tensor) and here.is_floating_point():
            close(here, there)


@pytest.mark.kernel("rms_norm", shapes=HIDDEN, rivals=[rival("F.rms_norm", plain(torch_rms_norm))])
def test_rms_norm(bench: Bench, shape: Rows, contender: Contender) -> None:
    def make() -> tuple[Any, ...]:
        return bench.randn(shape.rows, shape.width), bench.randn(shape.width), EPS

    moved = (2 * shape.rows + 1) * shape.width * bench.dtype.itemsize
    bench.measure(contender, "rms_norm", shape, make, moved, same_result)


@pytest.mark.kernel("add_rms_norm", shapes=HIDDEN, rivals=[rival("+= F.rms_norm", plain(torch_add_rms_norm))])
def test_add_rms_norm(bench: Bench, shape: Rows, contender: Contender) -> None:
    def make() -> tuple[Any, ...]:
        x, residual = (bench.randn(shape.rows, shape.width) for _ in range(2))
        return x, residual, bench.randn(shape.width), EPS

    moved = (4 * shape.rows + 1) * shape.width * bench.dtype.itemsize
    bench.measure(contender, "add_rms_norm", shape, make, moved, same_arguments)


@pytest.mark.kernel("silu_and_mul", shapes=FEED_FORWARD, rivals=[rival("F.silu * up", plain(torch_silu_and_mul))])
def test_silu_and_mul(bench: Bench, shape: Rows, contender: Contender) -> None:
    def make() -> tuple[Any, ...]:
        return (bench.randn(shape.rows, 2 * shape.width),)

    moved = 3 * shape.rows * shape.width * bench.dtype.itemsize
    bench.measure(contender, "silu_and_mul", shape, make, moved, same_result)


@pytest.mark.kernel("rope_and_cache", shapes=HEADS, rivals=[rival("torch eager", plain(torch_rope_and_cache))])
def test_rope_and_cache(bench: Bench, shape: Heads, contender: Contender) -> None:
    pages = -(-shape.rows // 16) + 1

    def make() -> tuple[Any, ...]:
        heads = shape.query_heads + 2 * shape.kv_heads
        qkv = bench.randn(shape.rows, heads, HEAD_DIM)
        angles = torch.rand(MAX_POSITION, HEAD_DIM // 2, device=bench.device) * 6
        caches = [bench.randn(pages, 16, shape.kv_heads, HEAD_DIM) for _ in range(2)]
        return (
            *qkv.split((shape.query_heads, shape.kv_heads, shape.kv_heads), dim=1),  # type: ignore[no-untyped-call]
            torch.randint(MAX_POSITION, (shape.rows,), device=bench.device),
            torch.cat((angles.cos(), angles.sin()), dim=-1),
            *caches,
            torch.randperm(pages * 16, device=bench.device)[: shape.rows],
        )

    per_row = (2 * shape.query_heads + 4 * shape.kv_heads) * HEAD_DIM * bench.dtype.itemsize + 4 * HEAD_DIM
    bench.measure(contender, "rope_and_cache", shape, make, shape.rows * per_row, same_arguments)


@pytest.mark.kernel("copy_blocks", shapes=PAGES, rivals=[rival("cache[b] = cache[a]", plain(torch_copy_blocks))])
def test_copy_blocks(bench: Bench, shape: Pages, contender: Contender) -> None:
    page = (16, 8, HEAD_DIM)

    def make() -> tuple[Any, ...]:
        pairs = torch.randperm(shape.pages, device=bench.device)[: 2 * shape.pairs].view(-1, 2)
        return bench.randn(shape.pages, *page), pairs

    moved = 2 * shape.pairs * page[0] * page[1] * page[2] * bench.dtype.itemsize
    bench.measure(contender, "copy_blocks", shape, make, moved, same_arguments)

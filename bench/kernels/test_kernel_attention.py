"""verify_attention over paged KV, beside torch's attention over KV that lies ready, and the packages' own functions."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernels.kernel_bench import HEAD_DIM, Bench, Call, Contender, close, rival

KV_HEADS, GROUP = 8, 4


@dataclass(frozen=True)
class Attention:
    """Every sequence has as many rows and keys, which torch's attention needs."""

    batch: int
    rows: int
    context: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.rows} rows, {self.context} keys"


def grid(batches: tuple[int, ...], contexts: tuple[int, ...]) -> list[Attention]:
    return [Attention(b, rows, context) for b in batches for rows in (1, 9) for context in contexts]


SHAPES = {
    "tiny": [Attention(2, 3, 37)],
    "small": grid((1, 4), (512, 2048)),
    "real": grid((1, 8, 32), (1024, 8192, 32768)),
}


def torch_sdpa(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Call:
    """``[batch, heads, keys, head_dim]`` are gathered beforehand: only the attention is timed."""
    batch, context = len(context_lens), int(context_lens[0])
    rows = q.shape[0] // batch
    keys, values = (
        cache[block_tables.long()].flatten(1, 2)[:, :context].transpose(1, 2).contiguous()
        for cache in (k_cache, v_cache)
    )
    position = torch.arange(context - rows, context, device=q.device)[:, None]
    mask = None if rows == 1 else torch.arange(context, device=q.device) <= position
    queries = q.unflatten(0, (batch, rows)).transpose(1, 2)  # type: ignore[no-untyped-call]

    def call() -> Tensor:
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return call


def flash_attn_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Call:
    """With equally many rows for all sequences, which the operator's arguments do not promise."""
    function = importlib.import_module("flash_attn").flash_attn_with_kvcache
    queries = q.unflatten(0, (len(context_lens), -1))  # type: ignore[no-untyped-call]

    def call() -> Tensor:
        out: Tensor = function(
            queries, k_cache, v_cache, cache_seqlens=context_lens, block_table=block_tables, softmax_scale=scale,
            causal=True,
        )  # fmt: skip
        return out.flatten(0, 1)

    return call


def flashinfer_run(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
) -> Call:
    """Planned beforehand: a forward plans once for all its layers."""
    from pearl_kernels.flashinfer import page_lists

    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = importlib.import_module("flashinfer").BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
    page_size, kv_heads, head_dim = k_cache.shape[1:]
    lists = page_lists(context_lens.cpu(), query_start.cpu(), block_tables.cpu(), page_size)
    wrapper.plan(
        *lists, q.shape[1], kv_heads, head_dim, page_size, causal=True, sm_scale=scale, q_data_type=q.dtype,
        kv_data_type=q.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(q, (k_cache, v_cache))


def without(package: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(package) is None


RIVALS = [
    rival("F.scaled_dot..., dense KV", torch_sdpa),
    rival("flash-attn, paged", flash_attn_kvcache, page_size=256, devices=("cuda",),
          missing=without("flash_attn")),
    rival("flashinfer, planned", flashinfer_run, capturable=False, devices=("cuda",), missing=without("flashinfer")),
]  # fmt: skip


def same_result(result: Tensor, expected: Tensor, *_: Any) -> None:
    close(result, expected)


@pytest.mark.kernel("verify_attention", shapes=SHAPES, rivals=RIVALS)
def test_verify_attention(bench: Bench, shape: Attention, contender: Contender) -> None:
    page_size = contender.page_size
    pages = -(-shape.context // page_size)

    def make() -> tuple[Any, ...]:
        k_cache, v_cache = (bench.randn(shape.batch * pages, page_size, KV_HEADS, HEAD_DIM) for _ in range(2))
        return (
            bench.randn(shape.batch * shape.rows, GROUP * KV_HEADS, HEAD_DIM),
            k_cache,
            v_cache,
            torch.randperm(shape.batch * pages, device=bench.device).int().view(shape.batch, pages),
            torch.arange(shape.batch + 1, device=bench.device, dtype=torch.int32) * shape.rows,
            torch.full((shape.batch,), shape.context, device=bench.device, dtype=torch.int32),
            HEAD_DIM**-0.5,
        )

    row = HEAD_DIM * bench.dtype.itemsize
    keys_and_values = 2 * shape.batch * shape.context * KV_HEADS * row
    moved = keys_and_values + 2 * shape.batch * shape.rows * GROUP * KV_HEADS * row
    bench.measure(contender, "verify_attention", shape, make, moved, same_result, streams=keys_and_values)

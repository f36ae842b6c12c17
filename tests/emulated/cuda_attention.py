"""Calls of CUDA's verify_attention under the shim, for the tests beside this file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from cuda_emu import build
from ops_support import Paged
from torch import Tensor

from pearl_kernels import reference

attention = build.operator("verify_attention")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HALF_ULPS = {FP32: 0.0, BF16: 0.5, FP16: 0.5 * 2.0**-3}  # in bf16's units


def run(
    function: Callable[..., Any], q: Tensor, cache: Paged, window: int = 0, softcap: float = 0.0, **how: Any
) -> Tensor:
    index = (cache.block_tables, cache.query_start, cache.context_lens)
    result = function(q, cache.k_cache, cache.v_cache, *index, q.shape[2] ** -0.5, window, softcap, **how)
    assert isinstance(result, Tensor)
    return result


def exact(q: Tensor, cache: Paged, window: int = 0, softcap: float = 0.0, **how: Any) -> Tensor:
    index = (cache.block_tables, cache.query_start, cache.context_lens)
    wide = Paged(cache.k_cache.float(), cache.v_cache.float(), *index)
    return run(reference.verify_attention, q.float(), wide, window, softcap, **how)


def only(q: Tensor, cache: Paged, chosen: Sequence[int]) -> tuple[Tensor, Paged]:
    """The same without the other sequences; the block tables are as wide as these need."""
    starts = cache.query_start.tolist()
    rows = [row for r in chosen for row in range(starts[r], starts[r + 1])]
    lengths = cache.context_lens[list(chosen)]
    pages = -(-int(lengths.max()) // cache.k_cache.shape[1])
    counts = torch.tensor([0, *(starts[r + 1] - starts[r] for r in chosen)])
    tables = cache.block_tables[list(chosen), :pages].contiguous()
    return q[rows], Paged(cache.k_cache, cache.v_cache, tables, counts.cumsum(0).int(), lengths)


def arguments(q: Tensor, cache: Paged, out: Tensor, most_rows: int = 0, counters: Tensor | None = None) -> list[Any]:
    """What the compiled module takes, but for the workspace and the stream."""
    (tokens, query_heads, head_dim), (pages, page_size, kv_heads, _) = q.shape, cache.k_cache.shape
    tables = cache.block_tables
    sizes = [len(cache.context_lens), tokens, query_heads, kv_heads, head_dim, pages, page_size]
    caches = [cache.k_cache.data_ptr(), cache.v_cache.data_ptr()]
    index = [tables.data_ptr(), tables.shape[1], tables.stride(0)]
    ranges = [cache.query_start.data_ptr(), cache.context_lens.data_ptr()]
    codes = [{FP32: 0, BF16: 1, FP16: 2}[t.dtype] for t in (q, cache.k_cache)]
    given = [*codes, *sizes, q.data_ptr(), q.stride(0), *caches, *index, *ranges, out.data_ptr(), 0.125, 0, 0.0]
    return [*given, 0, most_rows, *((0, 0) if counters is None else (counters.data_ptr(), counters.numel()))]

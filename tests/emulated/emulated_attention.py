"""What verify_attention is tested with on CPU tensors: inputs, and what the reference makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from ops_support import Paged, paged, strided_rows
from torch import Tensor

from pearl_kernels import reference


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """What a provider allocates and does not write, outputs and partial results, is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def inputs(
    sequences: Sequence[tuple[int, int]], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, page_size: int = 16
) -> tuple[Tensor, Paged]:
    """``sequences``: queries and context of each. Query rows lie apart, and the cache is poisoned."""
    queries, contexts = zip(*sequences, strict=True)
    cache = paged(queries, contexts, heads[1], head_dim, page_size, dtype)
    return strided_rows((torch.randn(sum(queries), heads[0], head_dim) * 2).to(dtype)), cache


def arguments(q: Tensor, cache: Paged) -> tuple[Tensor, ...]:
    return q, cache.k_cache, cache.v_cache, cache.block_tables, cache.query_start, cache.context_lens


def exactly(q: Tensor, cache: Paged, *how: Any) -> Tensor:
    index = (cache.block_tables, cache.query_start, cache.context_lens)
    return reference.verify_attention(q.float(), cache.k_cache.float(), cache.v_cache.float(), *index, *how)

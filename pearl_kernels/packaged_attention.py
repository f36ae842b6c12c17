"""What the ``verify_attention`` of installed packages (flash-attn, FlashInfer) have in common."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pearl_kernels.checks import Checks, cache_shape, group_size

if TYPE_CHECKING:
    from pearl_kernels.registry import Situation

DTYPES = (torch.bfloat16, torch.float16)


class Sizes(NamedTuple):
    rows: int
    query_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    sequences: int


def checked_sizes(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, query_start: Tensor, context_lens: Tensor
) -> Sizes:
    """The sizes of a call whose tensors are what the operator asks for, q and the caches of one dtype; else ValueError.

    All must be on q's device, whichever it is: the packages refuse a device that they do not know themselves.
    """
    op, checks = "verify_attention", Checks(q.device.type, DTYPES)
    checks.floating(op, "q", q)
    n, query_heads, head_dim = checks.heads(op, "q", q)
    pages, page_size, kv_heads, _ = cache_shape(op, k_cache)
    group_size(op, query_heads, kv_heads)
    if block_tables.dim() != 2:
        raise ValueError(f"{op}: block_tables must be [sequences, pages], not {list(block_tables.shape)}")
    sequences, width = context_lens.shape[0], block_tables.shape[1]
    checks.rows(op, "q", q, q.dtype, (n, query_heads, head_dim))
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.contiguous(op, name, cache, q.dtype, (pages, page_size, kv_heads, head_dim))
    checks.rows(op, "block_tables", block_tables, torch.int32, (sequences, width))
    checks.contiguous(op, "query_start", query_start, torch.int32, (sequences + 1,))
    checks.contiguous(op, "context_lens", context_lens, torch.int32, (sequences,))
    return Sizes(n, query_heads, kv_heads, head_dim, page_size, sequences)


def refuses(package: str, situation: Situation) -> str | None:
    """Why neither package can run in ``situation``; None leaves it to the package's own limits."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if situation.device != "cuda":
        return f"runs on cuda, not on {situation.device}"
    if situation.dtype not in DTYPES:
        return f"computes bfloat16 and float16, not {situation.dtype}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    return None

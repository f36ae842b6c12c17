"""``verify_attention`` through FlashAttention 2 (arXiv 2307.08691), where the package ``flash-attn`` is installed.

One sequence runs in ``flash_attn_with_kvcache``, which splits the keys over the device; several run in
``flash_attn_varlen_func``, which takes ragged rows but does not split. Nothing here waits for the device, and grids
depend on shapes only: both can be captured in a CUDA graph. Its paged cache wants pages of a multiple of 256 tokens.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pearl_kernels import packaged_attention
from pearl_kernels.provider import Situation

PAGE_SIZE = 256  # a page of the cache holds a multiple of so many tokens


def verify_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    most_rows: int = 0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As ``pearl_kernels.reference.verify_attention``; q and the caches are of one dtype, bf16 or fp16.

    Probabilities are rounded to that dtype before they meet the values, so the result is less exact than our own
    kernels'. Raises ValueError for inputs that it cannot take.
    """
    packaged_attention.refuse_sinks("flash-attn", sinks)
    sizes = packaged_attention.checked_sizes(q, k_cache, v_cache, block_tables, query_start, context_lens, most_rows)
    if sizes.page_size % PAGE_SIZE:
        raise ValueError(
            f"verify_attention: flash-attn needs pages of a multiple of {PAGE_SIZE} tokens, not {sizes.page_size}"
        )
    if sizes.rows == 0:
        return q.new_empty(q.shape)
    package = importlib.import_module("flash_attn")
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,  # aligned to the last key of each sequence, as ours is
        "window_size": (window - 1, 0) if window > 0 else (-1, -1),  # keys to the left and right of a row's own
        "softcap": softcap,
        "block_table": block_tables,
    }
    out: Tensor
    if sizes.sequences == 1:
        out = package.flash_attn_with_kvcache(q.unsqueeze(0), k_cache, v_cache, cache_seqlens=context_lens, **options)
        return out.squeeze(0)
    # The longest window is known on the device only. All rows bound it, and blocks past a sequence's rows end at once;
    # but a bound of 1 would say that each sequence has exactly one row.
    most_rows, most_keys = max(sizes.rows, 2), block_tables.shape[1] * sizes.page_size
    key_start = torch.nn.functional.pad(context_lens.cumsum(0, dtype=torch.int32), (1, 0))
    out = package.flash_attn_varlen_func(q, k_cache, v_cache, query_start, key_start, most_rows, most_keys, **options)
    return out


OPERATORS: Mapping[str, Callable[..., Any]] = {"verify_attention": verify_attention}


def refuses(op: str, situation: Situation) -> str | None:
    """None if ``op`` can run in ``situation`` with a package that works, else why not. Does not import it."""
    if reason := packaged_attention.refuses("flash_attn", situation):
        return reason
    if situation.head_dim % 8 or not 8 <= situation.head_dim <= 256:
        return f"needs a head_dim that is a multiple of 8 up to 256, not {situation.head_dim}"
    if situation.page_size % PAGE_SIZE:
        return f"needs a page_size that is a multiple of {PAGE_SIZE}, not {situation.page_size}"
    return None


def missing() -> str | None:
    """None if the package can be imported and has what is called here, else why not."""
    try:
        package = importlib.import_module("flash_attn")
    except Exception as error:  # built for another torch, or without a library that it needs
        return f"flash_attn cannot be imported: {error}"
    for name in ("flash_attn_with_kvcache", "flash_attn_varlen_func"):
        function = getattr(package, name, None)
        if function is None or not {"block_table", "softcap"} <= set(inspect.signature(function).parameters):
            return "needs flash-attn 2.6 or newer"
    return None

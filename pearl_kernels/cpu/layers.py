"""The decoder layer's operators in C++; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

Tensors are fp32 or bf16 (all of one call alike; q may differ from the KV cache in ``verify_attention``). Inputs that a
kernel cannot take raise ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pearl_kernels.cpu import _core
from pearl_kernels.cpu.checks import DTYPE_CODES, contiguous, floating, rows
from pearl_kernels.reference import LinearWeight

_MAX_HEAD_DIM = 256


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    code = floating("rms_norm", "x", x)
    n, width = _matrix("rms_norm", x)
    address, stride = rows("rms_norm", "x", x, x.dtype, (n, width))
    scale = contiguous("rms_norm", "weight", weight, x.dtype, (width,))
    out = x.new_empty((n, width))
    _core.rms_norm(code, n, width, address, stride, 0, 0, scale, out.data_ptr(), eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    code = floating("add_rms_norm", "x", x)
    n, width = _matrix("add_rms_norm", x)
    address, stride = rows("add_rms_norm", "x", x, x.dtype, (n, width))
    sum_address, sum_stride = rows("add_rms_norm", "residual", residual, x.dtype, (n, width))
    scale = contiguous("add_rms_norm", "weight", weight, x.dtype, (width,))
    out = x.new_empty((n, width))
    _core.rms_norm(code, n, width, address, stride, sum_address, sum_stride, scale, out.data_ptr(), eps)
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    code = floating("silu_and_mul", "x", x)
    n, width = _matrix("silu_and_mul", x)
    if width % 2:
        raise ValueError(f"silu_and_mul: x must have an even width, not {width}")
    address, stride = rows("silu_and_mul", "x", x, x.dtype, (n, width))
    out = x.new_empty((n, width // 2))
    _core.silu_and_mul(code, n, width // 2, address, stride, out.data_ptr())
    return out


def pack_linear(weight: Tensor) -> LinearWeight:
    """Panels of ``_core.PANEL_COLUMNS`` rows of weight, padded with zeros: ``LinearParams`` in params.h."""
    floating("pack_linear", "weight", weight)
    if weight.dim() != 2 or not weight.is_cpu:
        raise ValueError(f"pack_linear: weight must be a matrix on cpu, not {list(weight.shape)} on {weight.device}")
    out_features, in_features = weight.shape
    step = 4 // weight.element_size()
    panels, steps = -(-out_features // _core.PANEL_COLUMNS), -(-in_features // step)
    padding = (0, steps * step - in_features, 0, panels * _core.PANEL_COLUMNS - out_features)
    columns = torch.nn.functional.pad(weight, padding).view(panels, _core.PANEL_COLUMNS, steps, step)
    return LinearWeight(columns.transpose(1, 2).contiguous(), out_features, in_features)


def linear(x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
    """As the reference, on the calling thread. A row of the result does not depend, to the bit, on the other rows."""
    data, width, out_width = weight.data, weight.in_features, weight.out_features
    if data.dim() != 4:
        raise ValueError("linear: weight must come from this provider's pack_linear")
    n, _ = _matrix("linear", x)
    address, stride = rows("linear", "x", x, data.dtype, (n, width))
    add = 0 if bias is None else contiguous("linear", "bias", bias, data.dtype, (out_width,))
    out = x.new_empty((n, out_width))
    code = DTYPE_CODES[data.dtype]
    _core.linear(code, n, width, out_width, address, stride, data.data_ptr(), add, out.data_ptr())
    return out


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    op, dtype = "rope_and_cache", q.dtype
    code = floating(op, "q", q)
    n, query_heads, head_dim = _heads(op, "q", q)
    pages, page_size, kv_heads, _ = cache_shape = _cache_shape(op, k_cache)
    kv_shape = (n, kv_heads, head_dim)
    _core.rope_and_cache(
        code,
        n,
        query_heads,
        kv_heads,
        head_dim,
        *rows(op, "q", q, dtype, (n, query_heads, head_dim)),
        *rows(op, "k", k, dtype, kv_shape),
        *rows(op, "v", v, dtype, kv_shape),
        contiguous(op, "positions", positions, torch.int64, (n,)),
        contiguous(op, "cos_sin", cos_sin, torch.float32, (cos_sin.shape[0], head_dim)),
        cos_sin.shape[0],
        contiguous(op, "k_cache", k_cache, dtype, (pages, page_size, kv_heads, head_dim)),
        contiguous(op, "v_cache", v_cache, dtype, cache_shape),
        pages * page_size,
        contiguous(op, "slot_mapping", slot_mapping, torch.int64, (n,)),
        0 if q_norm is None else contiguous(op, "q_norm", q_norm, dtype, (head_dim,)),
        0 if k_norm is None else contiguous(op, "k_norm", k_norm, dtype, (head_dim,)),
        eps,
    )


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
) -> Tensor:
    op, cache_dtype = "verify_attention", k_cache.dtype
    q_code, cache_code = floating(op, "q", q), floating(op, "k_cache", k_cache)
    n, query_heads, head_dim = _heads(op, "q", q)
    pages, page_size, kv_heads, _ = _cache_shape(op, k_cache)
    cache_shape = (pages, page_size, kv_heads, head_dim)
    if kv_heads == 0 or query_heads % kv_heads:
        raise ValueError(f"{op}: {query_heads} query heads cannot be divided among {kv_heads} KV heads")
    sequences = context_lens.shape[0]
    if block_tables.dim() != 2:
        raise ValueError(f"{op}: block_tables must be [sequences, pages], not {list(block_tables.shape)}")
    width = block_tables.shape[1]
    table, table_stride = rows(op, "block_tables", block_tables, torch.int32, (sequences, width))
    out = q.new_empty((n, query_heads, head_dim))
    _core.verify_attention(
        q_code,
        cache_code,
        sequences,
        n,
        query_heads,
        kv_heads,
        head_dim,
        pages,
        page_size,
        *rows(op, "q", q, q.dtype, (n, query_heads, head_dim)),
        contiguous(op, "k_cache", k_cache, cache_dtype, cache_shape),
        contiguous(op, "v_cache", v_cache, cache_dtype, cache_shape),
        table,
        width,
        table_stride,
        contiguous(op, "query_start", query_start, torch.int32, (sequences + 1,)),
        contiguous(op, "context_lens", context_lens, torch.int32, (sequences,)),
        out.data_ptr(),
        scale,
        window,
        softcap,
    )
    return out


def copy_blocks(cache: Tensor, pairs: Tensor) -> None:
    """As the reference, for a contiguous cache of any dtype."""
    address = contiguous("copy_blocks", "cache", cache, cache.dtype, cache.shape)
    count = pairs.shape[0]
    pages = cache.shape[0]
    page_bytes = cache.stride(0) * cache.element_size()
    _core.copy_blocks(
        address, pages, page_bytes, contiguous("copy_blocks", "pairs", pairs, torch.int64, (count, 2)), count
    )


def _matrix(op: str, x: Tensor) -> tuple[int, int]:
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be a matrix, not {list(x.shape)}")
    n, width = x.shape
    return n, width


def _heads(op: str, name: str, x: Tensor) -> tuple[int, int, int]:
    if x.dim() != 3:
        raise ValueError(f"{op}: {name} must be [tokens, heads, head_dim], not {list(x.shape)}")
    n, heads, head_dim = x.shape
    if head_dim % 8 or not 8 <= head_dim <= _MAX_HEAD_DIM:
        raise ValueError(f"{op}: head_dim must be a multiple of 8 up to {_MAX_HEAD_DIM}, not {head_dim}")
    return n, heads, head_dim


def _cache_shape(op: str, cache: Tensor) -> tuple[int, int, int, int]:
    if cache.dim() != 4:
        raise ValueError(f"{op}: k_cache must be [pages, page_size, kv_heads, head_dim], not {list(cache.shape)}")
    pages, page_size, heads, head_dim = cache.shape
    return pages, page_size, heads, head_dim

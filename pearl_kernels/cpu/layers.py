"""The decoder layer's operators in C++; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

Tensors are fp32 or bf16 (all of one call alike; q may differ from the KV cache in ``verify_attention``). Inputs that a
kernel cannot take raise ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pearl_kernels.checks import DTYPE_CODES, Checks, cache_shape, group_size, matrix
from pearl_kernels.cpu import _core
from pearl_kernels.reference import LinearWeight

_checks = Checks("cpu", (torch.float32, torch.bfloat16))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    code = _checks.floating("rms_norm", "x", x)
    n, width = matrix("rms_norm", x)
    address, stride = _checks.rows("rms_norm", "x", x, x.dtype, (n, width))
    scale = _checks.contiguous("rms_norm", "weight", weight, x.dtype, (width,))
    out = x.new_empty((n, width))
    _core.rms_norm(code, n, width, address, stride, 0, 0, scale, out.data_ptr(), eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    code = _checks.floating("add_rms_norm", "x", x)
    n, width = matrix("add_rms_norm", x)
    address, stride = _checks.rows("add_rms_norm", "x", x, x.dtype, (n, width))
    sum_address, sum_stride = _checks.rows("add_rms_norm", "residual", residual, x.dtype, (n, width))
    scale = _checks.contiguous("add_rms_norm", "weight", weight, x.dtype, (width,))
    out = x.new_empty((n, width))
    _core.rms_norm(code, n, width, address, stride, sum_address, sum_stride, scale, out.data_ptr(), eps)
    return out


def silu_and_mul(x: Tensor) -> Tensor:
    code = _checks.floating("silu_and_mul", "x", x)
    n, width = matrix("silu_and_mul", x)
    if width % 2:
        raise ValueError(f"silu_and_mul: x must have an even width, not {width}")
    address, stride = _checks.rows("silu_and_mul", "x", x, x.dtype, (n, width))
    out = x.new_empty((n, width // 2))
    _core.silu_and_mul(code, n, width // 2, address, stride, out.data_ptr())
    return out


def pack_linear(weight: Tensor) -> LinearWeight:
    """Panels of ``_core.PANEL_COLUMNS`` rows of weight, padded with zeros: ``LinearParams`` in params.h."""
    _checks.floating("pack_linear", "weight", weight)
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
    n, _ = matrix("linear", x)
    address, stride = _checks.rows("linear", "x", x, data.dtype, (n, width))
    add = 0 if bias is None else _checks.contiguous("linear", "bias", bias, data.dtype, (out_width,))
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
    code = _checks.floating(op, "q", q)
    n, query_heads, head_dim = _checks.heads(op, "q", q)
    pages, page_size, kv_heads, _ = shape = cache_shape(op, k_cache)
    kv_shape = (n, kv_heads, head_dim)
    _core.rope_and_cache(
        code,
        n,
        query_heads,
        kv_heads,
        head_dim,
        *_checks.rows(op, "q", q, dtype, (n, query_heads, head_dim)),
        *_checks.rows(op, "k", k, dtype, kv_shape),
        *_checks.rows(op, "v", v, dtype, kv_shape),
        _checks.contiguous(op, "positions", positions, torch.int64, (n,)),
        _checks.contiguous(op, "cos_sin", cos_sin, torch.float32, (cos_sin.shape[0], head_dim)),
        cos_sin.shape[0],
        _checks.contiguous(op, "k_cache", k_cache, dtype, (pages, page_size, kv_heads, head_dim)),
        _checks.contiguous(op, "v_cache", v_cache, dtype, shape),
        pages * page_size,
        _checks.contiguous(op, "slot_mapping", slot_mapping, torch.int64, (n,)),
        0 if q_norm is None else _checks.contiguous(op, "q_norm", q_norm, dtype, (head_dim,)),
        0 if k_norm is None else _checks.contiguous(op, "k_norm", k_norm, dtype, (head_dim,)),
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
    q_code, cache_code = _checks.floating(op, "q", q), _checks.floating(op, "k_cache", k_cache)
    n, query_heads, head_dim = _checks.heads(op, "q", q)
    pages, page_size, kv_heads, _ = cache_shape(op, k_cache)
    shape = (pages, page_size, kv_heads, head_dim)
    group_size(op, query_heads, kv_heads)
    sequences = context_lens.shape[0]
    if block_tables.dim() != 2:
        raise ValueError(f"{op}: block_tables must be [sequences, pages], not {list(block_tables.shape)}")
    width = block_tables.shape[1]
    table, table_stride = _checks.rows(op, "block_tables", block_tables, torch.int32, (sequences, width))
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
        *_checks.rows(op, "q", q, q.dtype, (n, query_heads, head_dim)),
        _checks.contiguous(op, "k_cache", k_cache, cache_dtype, shape),
        _checks.contiguous(op, "v_cache", v_cache, cache_dtype, shape),
        table,
        width,
        table_stride,
        _checks.contiguous(op, "query_start", query_start, torch.int32, (sequences + 1,)),
        _checks.contiguous(op, "context_lens", context_lens, torch.int32, (sequences,)),
        out.data_ptr(),
        scale,
        window,
        softcap,
    )
    return out


def copy_blocks(cache: Tensor, pairs: Tensor) -> None:
    """As the reference, for a contiguous cache of any dtype."""
    address = _checks.contiguous("copy_blocks", "cache", cache, cache.dtype, cache.shape)
    count = pairs.shape[0]
    pages = cache.shape[0]
    page_bytes = cache.stride(0) * cache.element_size()
    _core.copy_blocks(
        address, pages, page_bytes, _checks.contiguous("copy_blocks", "pairs", pairs, torch.int64, (count, 2)), count
    )

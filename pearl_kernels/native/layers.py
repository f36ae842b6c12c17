"""The decoder layer's operators; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

The dtypes are those of the module's checks, all of one call alike, but for q, which may differ from the KV cache in
``verify_attention``. Inputs that a kernel cannot take raise ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pearl_kernels.checks import cache_shape, group_size, matrix
from pearl_kernels.native.module import NativeModule


class NativeLayers(NativeModule):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        checks = self.checks
        code = checks.floating("rms_norm", "x", x)
        n, width = matrix("rms_norm", x)
        address, stride = checks.rows("rms_norm", "x", x, x.dtype, (n, width))
        scale = checks.contiguous("rms_norm", "weight", weight, x.dtype, (width,))
        out = x.new_empty((n, width))
        self.module.rms_norm(
            code, n, width, address, stride, 0, 0, scale, out.data_ptr(), eps, self.where and self.where(x)
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
        checks, op = self.checks, "add_rms_norm"
        code = checks.floating(op, "x", x)
        n, width = matrix(op, x)
        address, stride = checks.rows(op, "x", x, x.dtype, (n, width))
        total, total_stride = checks.rows(op, "residual", residual, x.dtype, (n, width))
        scale = checks.contiguous(op, "weight", weight, x.dtype, (width,))
        out = x.new_empty((n, width))
        self.module.rms_norm(
            code,
            n,
            width,
            address,
            stride,
            total,
            total_stride,
            scale,
            out.data_ptr(),
            eps,
            self.where and self.where(x),
        )
        return out

    def silu_and_mul(self, x: Tensor) -> Tensor:
        code = self.checks.floating("silu_and_mul", "x", x)
        n, width = matrix("silu_and_mul", x)
        if width % 2:
            raise ValueError(f"silu_and_mul: x must have an even width, not {width}")
        address, stride = self.checks.rows("silu_and_mul", "x", x, x.dtype, (n, width))
        out = x.new_empty((n, width // 2))
        self.module.silu_and_mul(code, n, width // 2, address, stride, out.data_ptr(), self.where and self.where(x))
        return out

    def rope_and_cache(
        self,
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
        checks, op, dtype = self.checks, "rope_and_cache", q.dtype
        code = checks.floating(op, "q", q)
        n, query_heads, head_dim = checks.heads(op, "q", q)
        pages, page_size, kv_heads, _ = shape = cache_shape(op, k_cache)
        kv_shape = (n, kv_heads, head_dim)
        self.module.rope_and_cache(
            code,
            n,
            query_heads,
            kv_heads,
            head_dim,
            *checks.rows(op, "q", q, dtype, (n, query_heads, head_dim)),
            *checks.rows(op, "k", k, dtype, kv_shape),
            *checks.rows(op, "v", v, dtype, kv_shape),
            checks.contiguous(op, "positions", positions, torch.int64, (n,)),
            checks.contiguous(op, "cos_sin", cos_sin, torch.float32, (cos_sin.shape[0], head_dim)),
            cos_sin.shape[0],
            checks.contiguous(op, "k_cache", k_cache, dtype, (pages, page_size, kv_heads, head_dim)),
            checks.contiguous(op, "v_cache", v_cache, dtype, shape),
            pages * page_size,
            checks.contiguous(op, "slot_mapping", slot_mapping, torch.int64, (n,)),
            0 if q_norm is None else checks.contiguous(op, "q_norm", q_norm, dtype, (head_dim,)),
            0 if k_norm is None else checks.contiguous(op, "k_norm", k_norm, dtype, (head_dim,)),
            eps,
            self.where and self.where(q),
        )

    def verify_attention(
        self,
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
        checks, op, cache_dtype = self.checks, "verify_attention", k_cache.dtype
        q_code, cache_code = checks.floating(op, "q", q), checks.floating(op, "k_cache", k_cache)
        n, query_heads, head_dim = checks.heads(op, "q", q)
        pages, page_size, kv_heads, _ = cache_shape(op, k_cache)
        shape = (pages, page_size, kv_heads, head_dim)
        group_size(op, query_heads, kv_heads)
        sequences = context_lens.shape[0]
        if block_tables.dim() != 2:
            raise ValueError(f"{op}: block_tables must be [sequences, pages], not {list(block_tables.shape)}")
        width = block_tables.shape[1]
        table, table_stride = checks.rows(op, "block_tables", block_tables, torch.int32, (sequences, width))
        out = q.new_empty((n, query_heads, head_dim))
        arguments = (
            q_code,
            cache_code,
            sequences,
            n,
            query_heads,
            kv_heads,
            head_dim,
            pages,
            page_size,
            *checks.rows(op, "q", q, q.dtype, (n, query_heads, head_dim)),
            checks.contiguous(op, "k_cache", k_cache, cache_dtype, shape),
            checks.contiguous(op, "v_cache", v_cache, cache_dtype, shape),
            table,
            width,
            table_stride,
            checks.contiguous(op, "query_start", query_start, torch.int32, (sequences + 1,)),
            checks.contiguous(op, "context_lens", context_lens, torch.int32, (sequences,)),
            out.data_ptr(),
            scale,
            window,
            softcap,
        )
        self.run(op, q, arguments)
        return out

    def copy_blocks(self, cache: Tensor, pairs: Tensor) -> None:
        """As the reference, for a contiguous cache of any dtype."""
        address = self.checks.contiguous("copy_blocks", "cache", cache, cache.dtype, cache.shape)
        count = pairs.shape[0]
        moves = self.checks.contiguous("copy_blocks", "pairs", pairs, torch.int64, (count, 2))
        page_bytes = cache.stride(0) * cache.element_size() if cache.numel() else 0  # an empty tensor has strides too
        self.module.copy_blocks(address, cache.shape[0], page_bytes, moves, count, self.where and self.where(cache))

"""The decoder layer's operators; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

The dtypes are those of the module's checks, all of one call alike, but for q, which may differ from the KV cache in
``verify_attention``. Inputs that a kernel cannot take raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pearl_kernels.checks import DTYPE_CODES, matrix
from pearl_kernels.native.module import NativeModule
from pearl_kernels.operands import check_attention, check_rope


class NativeLayers(NativeModule):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        checks = self.checks.beside("rms_norm", "x", x)
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
        op = "add_rms_norm"
        checks = self.checks.beside(op, "x", x)
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
        return self._activate("silu_and_mul", self.module.silu_and_mul, x)

    def gelu_and_mul(self, x: Tensor) -> Tensor:
        return self._activate("gelu_and_mul", self.module.gelu_and_mul, x)

    def _activate(self, op: str, function: Callable[..., None], x: Tensor) -> Tensor:
        checks = self.checks.beside(op, "x", x)
        code = checks.floating(op, "x", x)
        n, width = matrix(op, x)
        if width % 2:
            raise ValueError(f"{op}: x must have an even width, not {width}")
        address, stride = checks.rows(op, "x", x, x.dtype, (n, width))
        out = x.new_empty((n, width // 2))
        function(code, n, width // 2, address, stride, out.data_ptr(), self.where and self.where(x))
        return out

    def scale_and_cap(self, x: Tensor, scale: float, softcap: float = 0.0) -> None:
        op = "scale_and_cap"
        checks = self.checks.beside(op, "x", x)
        code = checks.floating(op, "x", x)
        n, width = matrix(op, x)
        address, stride = checks.rows(op, "x", x, x.dtype, (n, width))
        self.module.scale_and_cap(code, n, width, address, stride, scale, softcap, self.where and self.where(x))

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
        n, query_heads, kv_heads, head_dim, max_position, slots = check_rope(
            self.checks, q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, q_norm, k_norm
        )
        self.module.rope_and_cache(
            DTYPE_CODES[q.dtype],
            n,
            query_heads,
            kv_heads,
            head_dim,
            *(q.data_ptr(), q.stride(0)),
            *(k.data_ptr(), k.stride(0)),
            *(v.data_ptr(), v.stride(0)),
            positions.data_ptr(),
            cos_sin.data_ptr(),
            max_position,
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slots,
            slot_mapping.data_ptr(),
            0 if q_norm is None else q_norm.data_ptr(),
            0 if k_norm is None else k_norm.data_ptr(),
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
        most_rows: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        sizes = check_attention(
            self.checks, q, k_cache, v_cache, block_tables, query_start, context_lens, most_rows, sinks
        )
        counters = self.counters and self.counters(q)
        out = q.new_empty((sizes.rows, sizes.query_heads, sizes.head_dim))
        arguments = (
            DTYPE_CODES[q.dtype],
            DTYPE_CODES[k_cache.dtype],
            sizes.sequences,
            sizes.rows,
            sizes.query_heads,
            sizes.kv_heads,
            sizes.head_dim,
            sizes.pages,
            sizes.page_size,
            *(q.data_ptr(), q.stride(0)),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            block_tables.data_ptr(),
            sizes.table_width,
            block_tables.stride(0),
            query_start.data_ptr(),
            context_lens.data_ptr(),
            out.data_ptr(),
            scale,
            window,
            softcap,
            0 if sinks is None else sinks.data_ptr(),
            most_rows,
            *((0, 0) if counters is None else (counters.data_ptr(), counters.numel())),
        )
        self.run("verify_attention", q, arguments)
        return out

    def copy_blocks(self, cache: Tensor, pairs: Tensor) -> None:
        """As the reference, for a contiguous cache of any dtype."""
        checks = self.checks.beside("copy_blocks", "cache", cache)
        address = checks.contiguous("copy_blocks", "cache", cache, cache.dtype, cache.shape)
        count = pairs.shape[0]
        moves = checks.contiguous("copy_blocks", "pairs", pairs, torch.int64, (count, 2))
        page_bytes = cache.stride(0) * cache.element_size() if cache.numel() else 0  # an empty tensor has strides too
        self.module.copy_blocks(address, cache.shape[0], page_bytes, moves, count, self.where and self.where(cache))

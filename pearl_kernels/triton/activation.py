"""``silu_and_mul`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

Elementwise: three memory accesses and one exponential an element, bandwidth is the limit. A row is cut into tiles so
that the few rows of a decoding step still give every multiprocessor some.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels.checks import matrix
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.variants import Variant

_BLOCK, _WARPS = 1024, 4  # 8 elements a thread: a vector of bf16 from either half


@triton.jit
def silu_and_mul_kernel(x, out, x_stride, width, tiles, BLOCK: tl.constexpr):
    """Program i: tile ``i % tiles`` of row ``i // tiles``; x ``[rows, 2 * width]``, out ``[rows, width]``."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    columns = program % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gates = x + row * x_stride + columns
    gate = tl.load(gates, inside, 0.0).to(tl.float32)
    up = tl.load(gates + width, inside, 0.0).to(tl.float32)
    # exp may overflow: the quotient is then the zero that it should be.
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), inside)


def silu_and_mul(x: Tensor) -> Tensor:
    op = "silu_and_mul"
    checks = CHECKS.beside(op, "x", x)
    checks.floating(op, "x", x)
    n, width = matrix(op, x)
    if width % 2:
        raise ValueError(f"{op}: x must have an even width, not {width}")
    checks.rows(op, "x", x, x.dtype, (n, width))
    width //= 2
    out = x.new_empty((n, width))
    if out.numel():
        tiles = triton.cdiv(width, _BLOCK)
        silu_and_mul_kernel[(n * tiles,)](x, out, x.stride(0), width, tiles, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def _variant(dtype: str, width: int) -> Variant:
    return Variant(
        name=f"silu_and_mul-{dtype}-{width}",
        kernel=silu_and_mul_kernel,
        signature={
            "x": f"*{dtype}",
            "out": f"*{dtype}",
            "x_stride": "i32",
            "width": "i32",
            "tiles": "i32",
            "BLOCK": "constexpr",
        },
        constexprs={"BLOCK": _BLOCK},
        num_warps=_WARPS,
        aligned=("x", "out", "x_stride", "width"),
    )


VARIANTS = tuple(_variant(dtype, 14336) for dtype in ("bf16", "fp16"))

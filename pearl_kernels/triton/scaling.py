"""``scale_and_cap`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

Elementwise: two memory accesses and, of a cap, one exponential an element; bandwidth is the limit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels.checks import matrix
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.variants import Variant

_BLOCK, _WARPS = 1024, 4  # 8 elements a thread: a vector of bf16


@triton.jit
def scale_and_cap_kernel(x, x_stride, width, tiles, scale, softcap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Program i: tile ``i % tiles`` of row ``i // tiles``; x ``[rows, width]``, in place."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    columns = program % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    target = x + row * x_stride + columns
    value = tl.load(target, inside, 0.0).to(tl.float32) * scale
    if CAPPED:
        # tanh(u) = 1 - 2 / (1 + exp(2 u)): where exp overflows it is the 1 that it should be.
        capped = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * (value / softcap))))
        value = tl.where(value == float("-inf"), value, capped)
    tl.store(target, value.to(x.dtype.element_ty), inside)


def scale_and_cap(x: Tensor, scale: float, softcap: float = 0.0) -> None:
    op = "scale_and_cap"
    checks = CHECKS.beside(op, "x", x)
    checks.floating(op, "x", x)
    n, width = matrix(op, x)
    checks.rows(op, "x", x, x.dtype, (n, width))
    if x.numel():
        tiles = triton.cdiv(width, _BLOCK)
        shape = {"CAPPED": softcap > 0, "BLOCK": _BLOCK}
        scale_and_cap_kernel[(n * tiles,)](
            x, x.stride(0), width, tiles, float(scale), float(softcap), **shape, num_warps=_WARPS
        )


def _variant(dtype: str, width: int, capped: bool) -> Variant:
    return Variant(
        name=f"scale_and_cap-{dtype}-{width}{'-capped' if capped else ''}",
        kernel=scale_and_cap_kernel,
        signature={
            "x": f"*{dtype}",
            "x_stride": "i32",
            "width": "i32",
            "tiles": "i32",
            "scale": "fp32",
            "softcap": "fp32",
            "CAPPED": "constexpr",
            "BLOCK": "constexpr",
        },
        constexprs={"CAPPED": capped, "BLOCK": _BLOCK},
        num_warps=_WARPS,
        aligned=("x", "x_stride", "width"),
    )


VARIANTS = (_variant("bf16", 256000, True), _variant("bf16", 2304, False), _variant("fp16", 256000, True))

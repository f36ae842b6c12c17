"""``rms_norm`` and ``add_rms_norm`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

A program holds a whole row in registers, so that its sum of squares and its scaling read memory once. An element costs
four operations and two memory accesses (four with a residual): bandwidth is the limit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels.checks import matrix
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.variants import Variant

_MAX_WIDTH = 32768  # 32 elements a thread; with more, registers would be spilled


@triton.jit
def rms_norm_kernel(x, residual, weight, out, x_stride, residual_stride, width, eps, BLOCK: tl.constexpr):
    """Program r: row r of x, residual (or None) and out ``[rows, width]``. BLOCK >= width."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    scale = tl.load(weight + columns, inside, 0.0).to(tl.float32)  # under way while the row is summed
    value = tl.load(x + row * x_stride + columns, inside, 0.0).to(tl.float32)
    if residual is not None:
        sums = residual + row * residual_stride + columns
        value += tl.load(sums, inside, 0.0).to(tl.float32)
        rounded = value.to(out.dtype.element_ty)
        tl.store(sums, rounded, inside)
        value = rounded.to(tl.float32)  # what is stored is what is normed
    factor = tl.rsqrt(tl.sum(value * value) / width + eps)
    tl.store(out + row * width + columns, (value * factor * scale).to(out.dtype.element_ty), inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch("rms_norm", x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch("add_rms_norm", x, residual, weight, eps)


def _launch(op: str, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    checks = CHECKS.beside(op, "x", x)
    checks.floating(op, "x", x)
    n, width = matrix(op, x)
    checks.rows(op, "x", x, x.dtype, (n, width))
    if residual is not None:
        checks.rows(op, "residual", residual, x.dtype, (n, width))
    checks.contiguous(op, "weight", weight, x.dtype, (width,))
    if width > _MAX_WIDTH:
        raise ValueError(f"{op}: x must be at most {_MAX_WIDTH} wide, not {width}")
    out = x.new_empty((n, width))
    if out.numel():
        block, warps = _block(width)
        strides = x.stride(0), 0 if residual is None else residual.stride(0)
        rms_norm_kernel[(n,)](x, residual, weight, out, *strides, width, eps, BLOCK=block, num_warps=warps)
    return out


def _block(width: int) -> tuple[int, int]:
    """BLOCK, and the warps that leave a thread 16 elements, two vector loads of bf16, up to the most there are."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // (32 * 16), 1), 32)


def _variant(op: str, dtype: str, width: int) -> Variant:
    block, warps = _block(width)
    pointer, adds = f"*{dtype}", op == "add_rms_norm"
    return Variant(
        name=f"{op}-{dtype}-{width}",
        kernel=rms_norm_kernel,
        signature={
            "x": pointer,
            "residual": pointer if adds else "constexpr",
            "weight": pointer,
            "out": pointer,
            "x_stride": "i32",
            "residual_stride": "i32",
            "width": "i32",
            "eps": "fp32",
            "BLOCK": "constexpr",
        },
        constexprs={"BLOCK": block} if adds else {"BLOCK": block, "residual": None},
        num_warps=warps,
        aligned=("x", *(("residual",) if adds else ()), "weight", "out", "x_stride", "residual_stride", "width"),
    )


VARIANTS = tuple(
    _variant(op, dtype, width)
    for op in ("rms_norm", "add_rms_norm")
    for dtype, width in (("bf16", 4096), ("bf16", 8192), ("fp16", 4096))
)

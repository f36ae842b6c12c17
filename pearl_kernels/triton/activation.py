"""``silu_and_mul`` and ``gelu_and_mul`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

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
def activation_kernel(x, out, x_stride, width, tiles, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Program i: tile ``i % tiles`` of row ``i // tiles``; x ``[rows, 2 * width]``, out ``[rows, width]``.

    Both activations are g / (1 + exp(-t)): t = g, or twice what GELU takes the tanh of.
    """
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    columns = program % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gates = x + row * x_stride + columns
    gate = tl.load(gates, inside, 0.0).to(tl.float32)
    up = tl.load(gates + width, inside, 0.0).to(tl.float32)
    inner = 1.5957691216 * gate * (1.0 + 0.044715 * gate * gate) if GELU else gate
    # exp may overflow: the quotient is then the zero that it should be.
    value = gate / (1.0 + tl.exp(-inner)) * up
    tl.store(out + row * width + columns, value.to(out.dtype.element_ty), inside)


def silu_and_mul(x: Tensor) -> Tensor:
    return _launch("silu_and_mul", x)


def gelu_and_mul(x: Tensor) -> Tensor:
    return _launch("gelu_and_mul", x)


def _launch(op: str, x: Tensor) -> Tensor:
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
        shape = {"GELU": op == "gelu_and_mul", "BLOCK": _BLOCK}
        activation_kernel[(n * tiles,)](x, out, x.stride(0), width, tiles, **shape, num_warps=_WARPS)
    return out


def _variant(op: str, dtype: str, width: int) -> Variant:
    return Variant(
        name=f"{op}-{dtype}-{width}",
        kernel=activation_kernel,
        signature={
            "x": f"*{dtype}",
            "out": f"*{dtype}",
            "x_stride": "i32",
            "width": "i32",
            "tiles": "i32",
            "GELU": "constexpr",
            "BLOCK": "constexpr",
        },
        constexprs={"GELU": op == "gelu_and_mul", "BLOCK": _BLOCK},
        num_warps=_WARPS,
        aligned=("x", "out", "x_stride", "width"),
    )


VARIANTS = tuple(_variant(op, dtype, 14336) for op in ("silu_and_mul", "gelu_and_mul") for dtype in ("bf16", "fp16"))

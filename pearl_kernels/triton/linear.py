"""Weight-only ``linear`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

Integers of 4 and 8 bits, and fp8, stay as they are in memory. For few rows, those of decoding steps and of verification
windows, a program reads its outputs' weights once for all of them (``weight_tile``). For more rows, prompts', the
matrix is decoded to x's dtype and torch multiplies. Plain weights are torch's alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels import reference
from pearl_kernels.checks import matrix
from pearl_kernels.reference import LinearWeight, QuantizedMatrix, WeightFormat, dequantize
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.variants import Variant
from pearl_kernels.triton.weight_tile import (
    FP8,
    INT4,
    INT8,
    LEAST,
    RUN,
    block_of,
    inputs_of_bytes,
    kind_of,
    nibbles,
    numbers,
    tile_product,
)

FEW_ROWS = 64  # of one product; more are prompts, for which decoding the matrix once costs little
_OUTPUTS, _WARPS, _STAGES = 32, 4, 4


@triton.jit
def few_rows_kernel(
    x, weight, scale, offset, bias, out, rows, outputs, inputs, x_stride, row_bytes, group,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program i: outputs ``[i * BLOCK_OUT, ...)`` of all rows; see ``tile_product``. bias ``[outputs]`` or None."""
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, BLOCK_ROWS)
    live = column < outputs
    total = tile_product(
        x + row.to(tl.int64) * x_stride, row < rows, weight, column, live, scale, offset, outputs, inputs, row_bytes,
        group, KIND, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + column, live, 0.0).to(tl.float32)[:, None]
    places = out + row[None, :].to(tl.int64) * outputs + column[:, None]
    tl.store(places, total.to(out.dtype.element_ty), live[:, None] & (row[None, :] < rows))


@triton.jit
def decode_kernel(
    weight, scale, offset, out, outputs, inputs, row_bytes, group, KIND: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program (i, j): outputs from ``i * BLOCK_OUT`` on, inputs from ``j * BLOCK_IN`` on; out ``[outputs, inputs]``."""
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    begin = tl.program_id(1) * BLOCK_IN
    live = column < outputs
    place = begin // group * outputs + column
    lines, rows = weight + column[:, None].to(tl.int64) * row_bytes, out + column[:, None].to(tl.int64) * inputs
    factor = tl.load(scale + place, live, 0.0)[:, None]
    if KIND == INT4:
        byte = begin // 2 + tl.arange(0, BLOCK_IN // 2)
        data = tl.load(lines + byte[None, :], live[:, None] & (byte[None, :] < row_bytes), 0)
        for half in tl.static_range(2):
            k = inputs_of_bytes(begin, BLOCK_IN // 2) + half * RUN
            number = nibbles(data, 4 * half).to(tl.float32) * factor
            if offset is not None:
                number += tl.load(offset + place, live, 0.0)[:, None]
            tl.store(rows + k[None, :], number.to(out.dtype.element_ty), live[:, None] & (k[None, :] < inputs))
    else:
        k = begin + tl.arange(0, BLOCK_IN)
        data = tl.load(lines + k[None, :], live[:, None] & (k[None, :] < inputs), 0)
        number = numbers(data, KIND) * factor
        if offset is not None:
            number += tl.load(offset + place, live, 0.0)[:, None]
        tl.store(rows + k[None, :], number.to(out.dtype.element_ty), live[:, None] & (k[None, :] < inputs))


def pack_linear(weight: Tensor, weights: WeightFormat = "full") -> LinearWeight:
    return reference.pack_linear(weight, weights)


def weight_rows(weight: LinearWeight, rows: Tensor) -> Tensor:
    return reference.weight_rows(weight, rows)


def pack_quantized(matrix: QuantizedMatrix, dtype: torch.dtype) -> LinearWeight:
    """Bytes ``[M, ...]`` of two inputs each (0 and 16, 1 and 17, ... of 32) or one; scales and offsets ``[G, M]``.

    Groups that are no whole blocks of 32 inputs are decoded.
    """
    outputs, inputs = matrix.values.shape
    if matrix.group % LEAST and matrix.group < inputs:
        return pack_linear(dequantize(matrix).to(dtype))
    data = _two_a_byte(matrix.values) if matrix.bits == 4 else matrix.values.view(torch.uint8)
    scale, offset = matrix.scale.T.contiguous(), None if matrix.offset is None else matrix.offset.T.contiguous()
    fp8 = matrix.values.dtype == torch.float8_e4m3fn
    return LinearWeight(data.contiguous(), outputs, inputs, scale, offset, matrix.group, matrix.bits, fp8)


def linear(x: Tensor, weight: LinearWeight | Tensor, bias: Tensor | None = None) -> Tensor:
    if isinstance(weight, Tensor) or weight.group == 0:
        return reference.linear(x, weight, bias)
    checks = CHECKS.beside("linear", "x", x)
    checks.floating("linear", "x", x)
    n, _ = matrix("linear", x)
    checks.rows("linear", "x", x, x.dtype, (n, weight.in_features))
    checks.optional("linear", "bias", bias, x.dtype, (weight.out_features,))
    if n > FEW_ROWS:
        return F.linear(x, _decoded(weight, x.dtype), bias)
    out = x.new_empty((n, weight.out_features))
    if out.numel():
        sizes = n, weight.out_features, weight.in_features, x.stride(0), weight.data.shape[1], weight.group
        rows = max(16, triton.next_power_of_2(n))
        few_rows_kernel[(triton.cdiv(weight.out_features, _OUTPUTS),)](
            x, weight.data, weight.scale, weight.offset, bias, out, *sizes, KIND=kind_of(weight), BLOCK_ROWS=rows,
            BLOCK_OUT=_OUTPUTS, BLOCK_IN=block_of(weight), num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
    return out


def _decoded(weight: LinearWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty((weight.out_features, weight.in_features), dtype=dtype, device=weight.data.device)
    block = block_of(weight)
    grid = triton.cdiv(weight.out_features, _OUTPUTS), triton.cdiv(weight.in_features, block)
    decode_kernel[grid](
        weight.data, weight.scale, weight.offset, out, weight.out_features, weight.in_features, weight.data.shape[1],
        weight.group, KIND=kind_of(weight), BLOCK_OUT=_OUTPUTS, BLOCK_IN=block, num_warps=_WARPS,
    )  # fmt: skip
    return out


def _two_a_byte(values: Tensor) -> Tensor:
    run = int(RUN.value)
    padded = F.pad(values, (0, -values.shape[1] % (2 * run)))
    halves = (padded + 8).view(torch.uint8).view(values.shape[0], -1, 2, run)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1)


def _variant(
    kernel: triton.JITFunction, name: str, dtype: str, kind: tl.constexpr, offsets: bool, block: int, rows: int
) -> Variant:
    constants = {"KIND": kind.value, "BLOCK_ROWS": rows, "BLOCK_OUT": _OUTPUTS, "BLOCK_IN": block}
    if not offsets:
        constants["offset"] = None
    if rows:
        constants["bias"] = None
    types = {"weight": "*u8", "scale": "*fp32", "offset": "*fp32", "x": f"*{dtype}", "out": f"*{dtype}"}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in kernel.arg_names}
    return Variant(
        f"{name}-{dtype}",
        kernel,
        signature,
        {a: constants[a] for a, kind in signature.items() if kind == "constexpr"},
        num_warps=_WARPS,
        num_stages=_STAGES if rows else 3,
        aligned=tuple(a for a, kind in signature.items() if kind != "constexpr" and a != "rows"),
    )


_KINDS = {
    "int4-32": (INT4, False, 32),
    "int4-128-offsets": (INT4, True, 128),
    "int8-128": (INT8, False, 128),
    "fp8-128": (FP8, False, 128),
}
VARIANTS = tuple(
    variant
    for dtype in ("bf16", "fp16")
    for name, kind in _KINDS.items()
    for variant in (
        *(_variant(few_rows_kernel, f"linear-{name}-{rows}-rows", dtype, *kind, rows) for rows in (16, 64)),
        _variant(decode_kernel, f"decode-{name}", dtype, *kind, 0),
    )
)

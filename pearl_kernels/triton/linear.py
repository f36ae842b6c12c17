"""Weight-only ``linear`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

Integers of 4 and 8 bits, and fp8, stay as they are in memory. For few rows, those of decoding steps and of verification
windows, a program reads its outputs' weights once for all of them and makes numbers of x's dtype of them in registers,
which is exact; products are summed up in fp32 by themselves for each block of inputs of one group, then scaled. For
more rows, prompts', the matrix is decoded to x's dtype and torch multiplies. Plain weights are torch's alone.
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

FEW_ROWS = 64  # of one product; more are prompts, for which decoding the matrix once costs little
_INT4, _INT8, _FP8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_OUTPUTS, _WARPS, _STAGES = 32, 4, 4
_RUN = tl.constexpr(16)  # inputs whose four bits lie in the lower halves of bytes, before as many in the upper
_LEAST, _MOST = 32, 128  # inputs of a block


@triton.jit
def _fp8_numbers(bits):
    """fp32 of e4m3 bits: as fp16 they are 2^8 times less, subnormal ones too. Older GPUs have no such conversion."""
    sign = (bits & 0x80).to(tl.uint16) << 8
    magnitude = (bits & 0x7F).to(tl.uint16)
    number = (sign | (magnitude << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), number)


@triton.jit
def _nibbles(data, shift: tl.constexpr):
    return ((data >> shift) & 15).to(tl.int32) - 8


@triton.jit
def _numbers(data, KIND: tl.constexpr):
    """Of one byte each, in fp32."""
    if KIND == _FP8:
        return _fp8_numbers(data)
    return data.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def _inputs_of_bytes(begin, BYTES: tl.constexpr):
    """The inputs of the lower halves of bytes; those of the upper follow _RUN later."""
    index = tl.arange(0, BYTES)
    return begin + index // _RUN * (2 * _RUN) + index % _RUN


@triton.jit
def _x_tile(x, row, k, rows, inputs, x_stride):
    """``[k, row]``, zero where there is none."""
    inside = (k[:, None] < inputs) & (row[None, :] < rows)
    return tl.load(x + row[None, :].to(tl.int64) * x_stride + k[:, None], inside, 0.0)


@triton.jit
def few_rows_kernel(
    x, weight, scale, offset, bias, out, rows, outputs, inputs, x_stride, row_bytes, group,
    KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Program i: outputs ``[i * BLOCK_OUT, ...)`` of all rows.

    weight uint8 ``[outputs, row_bytes]``; scale and offset (or None) fp32 ``[groups, outputs]``; bias ``[outputs]`` or
    None. A group is whole blocks of BLOCK_IN inputs.
    """
    column = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, BLOCK_ROWS)
    live = column < outputs
    lines = weight + column[:, None].to(tl.int64) * row_bytes
    total = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for begin in range(0, inputs, BLOCK_IN):
        place = begin // group * outputs + column
        if KIND == _INT4:
            byte = begin // 2 + tl.arange(0, BLOCK_IN // 2)
            data = tl.load(lines + byte[None, :], live[:, None] & (byte[None, :] < row_bytes), 0)
            k = _inputs_of_bytes(begin, BLOCK_IN // 2)
            low, high = _x_tile(x, row, k, rows, inputs, x_stride), _x_tile(x, row, k + _RUN, rows, inputs, x_stride)
            number = _nibbles(data, 0).to(x.dtype.element_ty)
            products = tl.dot(number, low, input_precision="ieee")
            number = _nibbles(data, 4).to(x.dtype.element_ty)
            products = tl.dot(number, high, products, input_precision="ieee")
        else:
            k = begin + tl.arange(0, BLOCK_IN)
            data = tl.load(lines + k[None, :], live[:, None] & (k[None, :] < inputs), 0)
            low = _x_tile(x, row, k, rows, inputs, x_stride)
            products = tl.dot(_numbers(data, KIND).to(x.dtype.element_ty), low, input_precision="ieee")
        total += products * tl.load(scale + place, live, 0.0)[:, None]
        if offset is not None:
            inputs_sum = tl.sum(low.to(tl.float32), 0)
            if KIND == _INT4:
                inputs_sum += tl.sum(high.to(tl.float32), 0)
            total += tl.load(offset + place, live, 0.0)[:, None] * inputs_sum[None, :]
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
    if KIND == _INT4:
        byte = begin // 2 + tl.arange(0, BLOCK_IN // 2)
        data = tl.load(lines + byte[None, :], live[:, None] & (byte[None, :] < row_bytes), 0)
        for half in tl.static_range(2):
            k = _inputs_of_bytes(begin, BLOCK_IN // 2) + half * _RUN
            number = _nibbles(data, 4 * half).to(tl.float32) * factor
            if offset is not None:
                number += tl.load(offset + place, live, 0.0)[:, None]
            tl.store(rows + k[None, :], number.to(out.dtype.element_ty), live[:, None] & (k[None, :] < inputs))
    else:
        k = begin + tl.arange(0, BLOCK_IN)
        data = tl.load(lines + k[None, :], live[:, None] & (k[None, :] < inputs), 0)
        number = _numbers(data, KIND) * factor
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
    if matrix.group % _LEAST and matrix.group < inputs:
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
            x, weight.data, weight.scale, weight.offset, bias, out, *sizes, KIND=_kind(weight), BLOCK_ROWS=rows,
            BLOCK_OUT=_OUTPUTS, BLOCK_IN=_block(weight), num_warps=_WARPS, num_stages=_STAGES,
        )  # fmt: skip
    return out


def _decoded(weight: LinearWeight, dtype: torch.dtype) -> Tensor:
    out = torch.empty((weight.out_features, weight.in_features), dtype=dtype, device=weight.data.device)
    block = _block(weight)
    grid = triton.cdiv(weight.out_features, _OUTPUTS), triton.cdiv(weight.in_features, block)
    decode_kernel[grid](
        weight.data, weight.scale, weight.offset, out, weight.out_features, weight.in_features, weight.data.shape[1],
        weight.group, KIND=_kind(weight), BLOCK_OUT=_OUTPUTS, BLOCK_IN=block, num_warps=_WARPS,
    )  # fmt: skip
    return out


def _kind(weight: LinearWeight) -> int:
    kind = _FP8 if weight.fp8 else _INT4 if weight.bits == 4 else _INT8
    return int(kind.value)


def _block(weight: LinearWeight) -> int:
    """The largest power of two, up to the most, of which a group is whole ones."""
    if weight.group >= weight.in_features:
        return _MOST
    return min(_MOST, weight.group & -weight.group)


def _two_a_byte(values: Tensor) -> Tensor:
    run = int(_RUN.value)
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
    "int4-32": (_INT4, False, 32),
    "int4-128-offsets": (_INT4, True, 128),
    "int8-128": (_INT8, False, 128),
    "fp8-128": (_FP8, False, 128),
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

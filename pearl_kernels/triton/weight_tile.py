"""A tile of a product, for every kind of weight: numbers of x's dtype as they are, or of few bits with groups.

Weights of few bits become numbers of x's dtype in registers, which is exact: integers of 4 and 8 bits, and fp8. Their
products are summed up in fp32 by themselves for each block of inputs of one group, then scaled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pearl_kernels.reference import LinearWeight

PLAIN, INT4, INT8, FP8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
RUN = tl.constexpr(16)  # inputs whose four bits lie in the lower halves of bytes, before as many in the upper
LEAST, MOST = 32, 128  # inputs of a block


@triton.jit
def _fp8_numbers(bits):
    """fp32 of e4m3 bits: as fp16 they are 2^8 times less, subnormal ones too. Older GPUs have no such conversion."""
    sign = (bits & 0x80).to(tl.uint16) << 8
    magnitude = (bits & 0x7F).to(tl.uint16)
    number = (sign | (magnitude << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where(magnitude == 0x7F, float("nan"), number)


@triton.jit
def nibbles(data, shift: tl.constexpr):
    return ((data >> shift) & 15).to(tl.int32) - 8


@triton.jit
def numbers(data, KIND: tl.constexpr):
    """Of one byte each, in fp32."""
    if KIND == FP8:
        return _fp8_numbers(data)
    return data.to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def inputs_of_bytes(begin, BYTES: tl.constexpr):
    """The inputs of the lower halves of bytes; those of the upper follow RUN later."""
    index = tl.arange(0, BYTES)
    return begin + index // RUN * (2 * RUN) + index % RUN


@triton.jit
def _x_tile(left, present, k, inputs):
    """``[k, row]``, zero where there is none."""
    return tl.load(left[None, :] + k[:, None], (k[:, None] < inputs) & present[None, :], 0.0)


@triton.jit
def tile_product(
    left, present, weight, output, live, scale, offset, outputs, inputs, line, group,
    KIND: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """fp32 ``[OUTPUTS, ROWS]``: outputs ``output`` (where ``live``) of rows of x (where ``present``).

    left ``[ROWS]``: where rows of x begin. weight: ``line`` elements an output, numbers of x's dtype or bytes; scale
    and offset (or None) fp32 ``[groups, outputs]``. A group is whole blocks of INPUTS inputs. A row's result does not
    depend on the rows beside it.
    """
    dtype: tl.constexpr = left.dtype.element_ty
    lines = weight + output[:, None].to(tl.int64) * line
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for begin in range(0, inputs, INPUTS):
        if KIND == INT4:
            byte = begin // 2 + tl.arange(0, INPUTS // 2)
            data = tl.load(lines + byte[None, :], live[:, None] & (byte[None, :] < line), 0)
            k = inputs_of_bytes(begin, INPUTS // 2)
            low, high = _x_tile(left, present, k, inputs), _x_tile(left, present, k + RUN, inputs)
            products = tl.dot(nibbles(data, 0).to(dtype), low, input_precision="ieee")
            products = tl.dot(nibbles(data, 4).to(dtype), high, products, input_precision="ieee")
        else:
            k = begin + tl.arange(0, INPUTS)
            data = tl.load(lines + k[None, :], live[:, None] & (k[None, :] < inputs), 0)
            low = _x_tile(left, present, k, inputs)
            if KIND == PLAIN:
                total = tl.dot(data, low, total, input_precision="ieee")
            else:
                products = tl.dot(numbers(data, KIND).to(dtype), low, input_precision="ieee")
        if KIND != PLAIN:
            place = begin // group * outputs + output
            total += products * tl.load(scale + place, live, 0.0)[:, None]
            if offset is not None:
                inputs_sum = tl.sum(low.to(tl.float32), 0)
                if KIND == INT4:
                    inputs_sum += tl.sum(high.to(tl.float32), 0)
                total += tl.load(offset + place, live, 0.0)[:, None] * inputs_sum[None, :]
    return total


def kind_of(weight: LinearWeight) -> int:
    """KIND of a packed weight, or of a stack of them."""
    kind = PLAIN if weight.scale is None else FP8 if weight.fp8 else INT4 if weight.bits == 4 else INT8
    return int(kind.value)


def block_of(weight: LinearWeight) -> int:
    """The largest power of two, up to the most, of which a group is whole ones."""
    if weight.group >= weight.in_features:
        return MOST
    return min(MOST, weight.group & -weight.group)

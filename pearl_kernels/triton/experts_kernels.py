"""The kernels of a mixture's experts: tiles of rows that meet the same expert, and the sums of what experts make."""

from __future__ import annotations

import triton
import triton.language as tl

from pearl_kernels.triton.weight_tile import PLAIN, tile_product


@triton.jit
def _find(starts, tiles, experts, tile, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a tile, and the tile's first meeting and their end; an expert past the last if there is no tile."""
    number = tl.arange(0, EXPERTS)
    ends = tl.load(tiles + number, number < experts, 2147483647)  # tiles up to and with each expert's
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    there = expert < experts
    before = tl.load(tiles + expert - 1, there & (expert > 0), 0)
    begin = tl.load(starts + expert, there, 0) + (tile - before) * ROWS
    return expert, begin, tl.load(starts + expert + 1, there, 0)


@triton.jit
def gate_up_kernel(
    x,  # [N, WIDTH]
    weight,  # [experts, 2 * HIDDEN, line]
    scale,  # of few bits [experts, groups, 2 * HIDDEN], else None
    offset,  # as scale, or None
    bias,  # [experts, 2 * HIDDEN] or None
    order,  # [meetings], by expert: meeting m is row m // top_k
    starts,  # [experts + 1]: of each expert's meetings in order
    tiles,  # [experts]: of all experts up to each
    out,  # [meetings, HIDDEN], in order
    experts,
    top_k,
    line,
    group,
    gain,
    limit,
    extra,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Program (c, t): columns c of tile t's gates and ups, one after the other, and their unit."""
    expert, begin, end = _find(starts, tiles, experts, tl.program_id(1), ROWS, EXPERTS)
    if expert >= experts:
        return
    dtype: tl.constexpr = out.dtype.element_ty
    places = begin + tl.arange(0, ROWS)
    live = places < end
    rows = (tl.load(order + places, live, 0) // top_k).to(tl.int64)
    both = tl.arange(0, 2 * COLUMNS)
    output = tl.program_id(0) * COLUMNS + both // 2
    inside = output < HIDDEN
    output += both % 2 * HIDDEN
    total = _product(
        x + rows * WIDTH, live, weight, scale, offset, bias, expert.to(tl.int64), output, inside, 2 * HIDDEN, WIDTH,
        line, group, KIND, ROWS, 2 * COLUMNS, INPUTS,
    )  # fmt: skip
    total = total.to(dtype).to(tl.float32)  # as if it were stored
    gate, up = tl.split(tl.permute(tl.reshape(total, (COLUMNS, 2, ROWS)), (0, 2, 1)))
    gate = tl.where(gate > limit, limit, gate)  # a NaN stays one
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value = gate / (1.0 + tl.exp(-gain * gate)) * (up + extra)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(out + places[None, :].to(tl.int64) * HIDDEN + columns[:, None], value.to(dtype),
             live[None, :] & (columns < HIDDEN)[:, None])  # fmt: skip


@triton.jit
def down_kernel(
    x,  # [meetings, HIDDEN], in order
    weight,  # [experts, WIDTH, line]
    scale,
    offset,
    bias,  # [experts, WIDTH] or None
    order,
    starts,
    tiles,
    out,  # [meetings, WIDTH], as they were before they were sorted
    experts,
    line,
    group,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Program (c, t): columns c of tile t."""
    expert, begin, end = _find(starts, tiles, experts, tl.program_id(1), ROWS, EXPERTS)
    if expert >= experts:
        return
    places = begin + tl.arange(0, ROWS)
    live = places < end
    output = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = output < WIDTH
    total = _product(
        x + places.to(tl.int64) * HIDDEN, live, weight, scale, offset, bias, expert.to(tl.int64), output, inside, WIDTH,
        HIDDEN, line, group, KIND, ROWS, COLUMNS, INPUTS,
    )  # fmt: skip
    rows = tl.load(order + places, live, 0).to(tl.int64)
    tl.store(out + rows[None, :] * WIDTH + output[:, None], total.to(out.dtype.element_ty),
             live[None, :] & inside[:, None])  # fmt: skip


@triton.jit
def _product(
    left, present, weight, scale, offset, bias, expert, output, live, outputs, inputs, line, group,
    KIND: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """``tile_product`` with one expert's matrix of a stack, and its bias."""
    begin = expert * outputs
    if KIND != PLAIN:
        groups = (inputs + group - 1) // group
        scale += begin * groups
        if offset is not None:
            offset += begin * groups
    total = tile_product(
        left, present, weight + begin * line, output, live, scale, offset, outputs, inputs, line, group, KIND, ROWS,
        OUTPUTS, INPUTS,
    )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + begin + output, live, 0.0).to(tl.float32)[:, None]
    return total


@triton.jit
def combine_kernel(made, weights, shared, shared_gate, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Program (c, r): columns c of row r; made ``[N * TOP_K, width]``."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    if shared is not None:
        gate = tl.load(shared_gate + row).to(tl.float32)
        total = tl.load(shared + row * width + columns, inside, 0.0).to(tl.float32) / (1.0 + tl.exp(-gate))
    for place in range(TOP_K):
        meeting = row * TOP_K + place
        part = tl.load(made + meeting * width + columns, inside, 0.0).to(tl.float32)
        total += tl.load(weights + meeting) * part
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), inside)

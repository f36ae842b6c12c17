"""The kernels of ``verify_attention``: blocks of packed rows over the paged keys, and the merge of what splits found.

Packed row t of a sequence is query row ``t // GROUP``, head ``t % GROUP`` of those that share the KV head. So a
window's rows and a group's heads read each page once.

Exactness. Scores, softmax and sums are fp32. Two-byte keys and values go to the tensor cores as they are. The
probabilities, which are fp32, go there as the sum of two numbers of the values' type, because rounding them once, as
is usual, would cost bf16 outputs a relative 2^-9 before they are rounded themselves. This doubles the work of the dot
with the values, which is free while a program waits for memory, as in decoding and verification.

A row's result depends on its query, its keys and the plan (tile shape, split boundaries), not on the other rows and
sequences of the call: tiles begin at multiples of BLOCK_N, splits at multiples of split_keys, and keys that a row does
not see add exact zeros to its sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below every score, yet finite: exp2(_LOWEST - _LOWEST) is 1 and exp2(-inf - _LOWEST) is 0, so that a row that has seen
# no key so far is no special case.
_LOWEST = tl.constexpr(-3.0e38)
_SEARCHED = tl.constexpr(128)


@triton.jit
def _sequence_at(index, query_start, sequences, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, SPARE: tl.constexpr):
    """The last sequence r with ``query_start[r] * GROUP // BLOCK_M + r * SPARE <= index``.

    Counted over all sequences at once: the latency of one load, where a binary search would wait for one after another.
    """
    count = 0
    for first in range(0, sequences, _SEARCHED):
        r = first + tl.arange(0, _SEARCHED)
        start = tl.load(query_start + r, mask=r < sequences, other=0)
        begun = (start * GROUP // BLOCK_M + r * SPARE <= index) & (r < sequences)
        count += tl.sum(begun.to(tl.int32))
    return count - 1


@triton.jit
def _add_values(probabilities, v, total):
    """``total + probabilities @ v``, of a two-byte type with an error of at most 2^-17 of each probability."""
    if v.dtype == tl.float32:
        return tl.dot(probabilities, v, total, input_precision="ieee")
    # The leading bits that the type holds, cut off: exact, and cheaper than rounding there and back.
    bits = -(1 << 16) if v.dtype == tl.bfloat16 else -(1 << 13)
    high = (probabilities.to(tl.int32, bitcast=True) & bits).to(tl.float32, bitcast=True)
    low = (probabilities - high).to(v.dtype)
    return tl.dot(low, v, tl.dot(high.to(v.dtype), v, total))


@triton.jit
def _attend_tile(q, k, v, visible, peak, mass, total, scale, softcap, CAPPED: tl.constexpr):
    """A step of the online softmax: peak and mass ``[M]``, total ``[M, D]``; both sums are relative to 2^peak."""
    scores = tl.dot(q, k, input_precision="ieee") * scale
    if CAPPED:  # softcap * tanh(x), where the scale makes exp2(scores) = exp(2x)
        scores = softcap - 2.0 * softcap / (tl.exp2(scores) + 1.0)
    scores = tl.where(visible, scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    probabilities = tl.exp2(scores - higher[:, None])
    rescale = tl.exp2(peak - higher)
    mass = mass * rescale + tl.sum(probabilities, 1)
    return higher, mass, _add_values(probabilities, v, total * rescale[:, None])


@triton.jit(do_not_specialize=["table_stride", "sequences", "window"])
def attend_kernel(
    q, k_cache, v_cache, block_tables, query_start, context_lens, out, peaks,
    q_stride, table_stride, sequences, split_keys, scale, window, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, KV heads, splits): the block's rows over the split's keys. Scores are in units of exp2.

    out ``[N, Hq, splits, D]``: the result, or, if SPLIT, fp32 sums relative to 2^peak, with peak and mass in peaks
    ``[N, Hq, splits, 2]``. Nothing is written for a split of which the block sees nothing.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # a prompt's last rows see most keys: they begin first
    head, split = tl.program_id(1), tl.program_id(2)
    sequence = _sequence_at(block, query_start, sequences, GROUP, BLOCK_M, 1)
    begin = tl.load(query_start + sequence)
    rows = tl.load(query_start + sequence + 1) - begin
    past = tl.load(context_lens + sequence) - rows  # keys before the sequence's first query
    first = (block - begin * GROUP // BLOCK_M - sequence) * BLOCK_M
    if first >= rows * GROUP:
        return

    key_begin = 0
    key_end = past + tl.minimum((first + BLOCK_M - 1) // GROUP + 1, rows)
    if WINDOWED:
        key_begin = tl.maximum(past + first // GROUP + 1 - window, 0) // BLOCK_N * BLOCK_N
    if SPLIT:
        key_begin = tl.maximum(key_begin, split * split_keys)
        key_end = tl.minimum(key_end, (split + 1) * split_keys)
        if key_begin >= key_end:
            return

    compute: tl.constexpr = tl.float32 if q.dtype != k_cache.dtype else q.dtype.element_ty  # of the dots' operands
    lane = tl.arange(0, BLOCK_D)
    packed = first + tl.arange(0, BLOCK_M)
    position = past + packed // GROUP
    query = (begin + packed // GROUP).to(tl.int64) * q_stride + (head * GROUP + packed % GROUP) * HEAD_DIM
    live = (packed < rows * GROUP)[:, None] & (lane < HEAD_DIM)[None, :]
    q_block = tl.load(q + query[:, None] + lane[None, :], mask=live, other=0.0).to(compute)
    peak = tl.full([BLOCK_M], _LOWEST, tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    table = block_tables + sequence.to(tl.int64) * table_stride
    k_head, v_head = k_cache + head * HEAD_DIM, v_cache + head * HEAD_DIM
    key = key_begin + tl.arange(0, BLOCK_N)
    page = tl.load(table + key // PAGE_SIZE, mask=key < key_end, other=0)
    for tile in range(key_begin, key_end, BLOCK_N):
        # Pages are read a tile ahead, so that the copies of keys and values to shared memory, which the compiler starts
        # two tiles ahead, do not wait for their addresses.
        key = tile + tl.arange(0, BLOCK_N)
        slot = page * PAGE_SIZE + key % PAGE_SIZE
        page = tl.load(table + (key + BLOCK_N) // PAGE_SIZE, mask=key + BLOCK_N < key_end, other=0)
        cell = slot.to(tl.int64)[:, None] * (KV_HEADS * HEAD_DIM) + lane[None, :]
        held = (key < key_end)[:, None] & (lane < HEAD_DIM)[None, :]
        k = tl.load(k_head + cell, mask=held, other=0.0).to(compute)
        v = tl.load(v_head + cell, mask=held, other=0.0).to(compute)
        visible = key[None, :] <= position[:, None]
        if WINDOWED:
            visible = visible & (key[None, :] > position[:, None] - window)
        peak, mass, total = _attend_tile(q_block, tl.trans(k), v, visible, peak, mass, total, scale, softcap, CAPPED)

    # The same rows again, computed anew: kept through the loop they would cost the registers that spills are made of.
    begin = tl.load(query_start + sequence, volatile=True)
    packed = (block - begin * GROUP // BLOCK_M - sequence) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = (begin + packed // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + packed % GROUP
    row = row * tl.num_programs(2) + split
    live = packed < rows * GROUP
    if SPLIT:
        tl.store(peaks + row * 2, peak, mask=live)
        tl.store(peaks + row * 2 + 1, mass, mask=live)
    else:
        total = total / mass[:, None]
    held = live[:, None] & (lane < HEAD_DIM)[None, :]
    tl.store(out + row[:, None] * HEAD_DIM + lane[None, :], total.to(out.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize=["sequences", "splits", "window"])
def merge_kernel(
    sums, peaks, query_start, context_lens, out, sequences, splits, split_keys, window,
    QUERY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """Grid (tokens, query heads): the row's softmax over all keys, from those over the splits of which it sees keys.

    sums and peaks as attend_kernel writes them, out ``[N, Hq, D]``.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    sequence = _sequence_at(row, query_start, sequences, 1, 1, 0)
    end = tl.load(query_start + sequence + 1)
    position = tl.load(context_lens + sequence) - end + row
    if row >= end:
        return
    first = 0
    if WINDOWED:
        first = tl.maximum(position + 1 - window, 0) // split_keys
    last = position // split_keys

    lane = tl.arange(0, BLOCK_D)
    row = row.to(tl.int64) * QUERY_HEADS + head
    peak = tl.full([], _LOWEST, tl.float32)
    mass = 0.0
    total = tl.zeros([BLOCK_D], tl.float32)
    for step in range(first, last + 1, BLOCK_S):
        split = step + tl.arange(0, BLOCK_S)
        seen = split <= last
        part = row * splits + split
        part_peak = tl.load(peaks + part * 2, mask=seen, other=_LOWEST)
        part_mass = tl.load(peaks + part * 2 + 1, mask=seen, other=0.0)
        held = seen[:, None] & (lane < HEAD_DIM)[None, :]
        part_total = tl.load(sums + part[:, None] * HEAD_DIM + lane[None, :], mask=held, other=0.0)
        higher = tl.maximum(peak, tl.max(part_peak, 0))
        weight = tl.exp2(part_peak - higher)
        rescale = tl.exp2(peak - higher)
        mass = mass * rescale + tl.sum(part_mass * weight, 0)
        total = total * rescale + tl.sum(part_total * weight[:, None], 0)
        peak = higher
    tl.store(out + row * HEAD_DIM + lane, (total / mass).to(out.dtype.element_ty), mask=lane < HEAD_DIM)

"""The kernels of ``verify_attention``: blocks of packed rows over the paged keys, and the merge of what splits found.

Packed row t of a sequence is query row ``t // GROUP``, head ``t % GROUP`` of those that share the KV head. So a
window's rows and a group's heads read each page once.

Exactness. Scores, softmax and sums are fp32. Two-byte keys and values go to the tensor cores as they are. The
probabilities, which are fp32, go there as the sum of two numbers of the values' type, because rounding them once, as
is usual, would cost bf16 outputs a relative 2^-9 before they are rounded themselves. This doubles the work of the dot
with the values, which is free while a program waits for memory, as in decoding and verification.

A row's result depends on its query, its keys, the model (tile, SPLIT_KEYS) and on whether its own sequence is split,
not on the other rows and sequences of the call. Sequences of more than WINDOW_ROWS rows, prompts, are not split. They
have compilations of their own: a row's sums are always the same instructions in the same order. Tiles begin at
multiples of BLOCK_N, splits at multiples of SPLIT_KEYS, and keys that a row does not see add exact zeros to its sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below every score, yet finite: exp2(_LOWEST - _LOWEST) is 1 and exp2(-inf - _LOWEST) is 0, so that a row that has seen
# no key so far is no special case.
_LOWEST = tl.constexpr(-3.0e38)
_SEARCHED = tl.constexpr(128)
_LOG2E = tl.constexpr(1.4426950408889634)


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


@triton.jit
def _inverse_mass(sink, peak, mass):
    """1 over the mass of all keys that a row sees and of its head's sink, relative to 2^peak. Once for all splits."""
    sink = sink * _LOG2E
    top = tl.maximum(peak, sink)
    factor = tl.exp2(peak - top)
    return factor / (mass * factor + tl.exp2(sink - top))


@triton.jit
def _splits_seen(position, capacity, window, SPLIT_KEYS: tl.constexpr, WINDOWED: tl.constexpr):
    """The first and the last split of which a row at this position sees keys."""
    first_key = tl.maximum(position + 1 - window, 0) if WINDOWED else position * 0
    last_key = tl.maximum(position, 0)
    return tl.minimum(first_key, capacity - 1) // SPLIT_KEYS, tl.minimum(last_key, capacity - 1) // SPLIT_KEYS


_COUNTS = ["sequences", "capacity", "first_split", "end_split", "slots", "by_sequence", "window"]


@triton.jit(do_not_specialize=[*_COUNTS, "table_stride"])
def attend_kernel(
    q, k_cache, v_cache, block_tables, query_start, context_lens, sinks, out, sums, peaks,
    q_stride, table_stride, sequences, capacity, first_split, end_split, slots, by_sequence, scale, window, softcap,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT_KEYS: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks, KV heads, programs of a block): the block's rows over the keys. Scores are in units of exp2.

    ``sinks``: fp32 ``[Hq]``, or None.

    Not SPLIT: rows of sequences with more than WINDOW_ROWS rows; results go to out ``[N, Hq, D]``. SPLIT: rows of the
    others, over the splits of ``[first_split, end_split)``, each program over every so many-th. Rows that see keys of
    one split only go to out, others as fp32 sums relative to 2^peak to sums ``[partial rows, Hq, slots, D]``, with peak
    and mass in peaks ``[partial rows, Hq, slots, 2]``. Partial rows are tokens, or, if by_sequence, WINDOW_ROWS of each
    sequence, and blocks are as many as those fill.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # a prompt's last rows see most keys: they begin first
    head = tl.program_id(1)
    blocks: tl.constexpr = (WINDOW_ROWS * GROUP + BLOCK_M - 1) // BLOCK_M
    if SPLIT and by_sequence != 0:
        sequence = block // blocks
        begin = tl.load(query_start + sequence)
        first = block % blocks * BLOCK_M
    else:
        sequence = _sequence_at(block, query_start, sequences, GROUP, BLOCK_M, 1)
        begin = tl.load(query_start + sequence)
        first = (block - begin * GROUP // BLOCK_M - sequence) * BLOCK_M
    rows = tl.load(query_start + sequence + 1) - begin
    past = tl.load(context_lens + sequence) - rows  # keys before the sequence's first query
    if (first >= rows * GROUP) | ((rows > WINDOW_ROWS) == SPLIT):
        return

    block_begin = 0
    block_end = tl.minimum(past + tl.minimum((first + BLOCK_M - 1) // GROUP + 1, rows), capacity)
    if WINDOWED:
        block_begin = tl.maximum(past + first // GROUP + 1 - window, 0) // BLOCK_N * BLOCK_N
    from_split, to_split = 0, 1
    if SPLIT:
        from_split = tl.maximum(block_begin // SPLIT_KEYS, first_split) + tl.program_id(2)
        to_split = tl.minimum(tl.maximum(block_end - 1, 0) // SPLIT_KEYS + 1, end_split)
        if from_split >= to_split:
            return

    compute: tl.constexpr = tl.float32 if q.dtype != k_cache.dtype else q.dtype.element_ty  # of the dots' operands
    lane = tl.arange(0, BLOCK_D)
    packed = first + tl.arange(0, BLOCK_M)
    position = tl.minimum(past + packed // GROUP, capacity - 1)  # beyond the table there are no keys to see
    query = (begin + packed // GROUP).to(tl.int64) * q_stride + (head * GROUP + packed % GROUP) * HEAD_DIM
    live = (packed < rows * GROUP)[:, None] & (lane < HEAD_DIM)[None, :]
    q_block = tl.load(q + query[:, None] + lane[None, :], mask=live, other=0.0).to(compute)
    table = block_tables + sequence.to(tl.int64) * table_stride
    k_head, v_head = k_cache + head * HEAD_DIM, v_cache + head * HEAD_DIM

    for split in range(from_split, to_split, tl.num_programs(2)):
        key_begin, key_end = block_begin, block_end
        if SPLIT:
            key_begin = tl.maximum(block_begin, split * SPLIT_KEYS)
            key_end = tl.minimum(block_end, split * SPLIT_KEYS + SPLIT_KEYS)
        peak = tl.full([BLOCK_M], _LOWEST, tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        key = key_begin + tl.arange(0, BLOCK_N)
        page = tl.load(table + key // PAGE_SIZE, mask=key < key_end, other=0)
        for tile in range(key_begin, key_end, BLOCK_N):
            # Pages are read a tile ahead, so that the copies of keys and values to shared memory, which the compiler
            # starts two tiles ahead, do not wait for their addresses.
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
            peak, mass, total = _attend_tile(
                q_block, tl.trans(k), v, visible, peak, mass, total, scale, softcap, CAPPED
            )

        _store_rows(
            sinks, out, sums, peaks, query_start, block, sequence, rows, past, head, split, peak, mass, total,
            capacity, first_split, slots, by_sequence, window,
            KV_HEADS, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, SPLIT_KEYS, WINDOW_ROWS, WINDOWED, SPLIT,
        )  # fmt: skip


@triton.jit
def _store_rows(
    sinks, out, sums, peaks, query_start, block, sequence, rows, past, head, split, peak, mass, total,
    capacity, first_split, slots, by_sequence, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, WINDOW_ROWS: tl.constexpr, WINDOWED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """What the rows of attend_kernel's block have of a split, or of all keys if not SPLIT.

    Which rows they are is computed anew: kept through the loop it would cost the registers that spills are made of.
    """
    begin = tl.load(query_start + sequence, volatile=True)
    part = begin
    first = (block - begin * GROUP // BLOCK_M - sequence) * BLOCK_M
    if SPLIT and by_sequence != 0:
        part = sequence * WINDOW_ROWS
        first = block % ((WINDOW_ROWS * GROUP + BLOCK_M - 1) // BLOCK_M) * BLOCK_M
    lane = tl.arange(0, BLOCK_D)
    packed = first + tl.arange(0, BLOCK_M)
    live = packed < rows * GROUP
    column = head * GROUP + packed % GROUP
    row = (begin + packed // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + column
    if SPLIT:
        first_seen, last_seen = _splits_seen(past + packed // GROUP, capacity, window, SPLIT_KEYS, WINDOWED)
        partial = live & (first_seen < last_seen)
        place = ((part + packed // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + column) * slots + split - first_split
        tl.store(peaks + place * 2, peak, mask=partial)
        tl.store(peaks + place * 2 + 1, mass, mask=partial)
        held = partial[:, None] & (lane < HEAD_DIM)[None, :]
        tl.store(sums + place[:, None] * HEAD_DIM + lane[None, :], total, mask=held)
        live = live & (first_seen == last_seen) & (last_seen == split)
    if sinks is not None:
        sink = tl.load(sinks + column, mask=live, other=0.0)
        result = (total * _inverse_mass(sink, peak, mass)[:, None]).to(out.dtype.element_ty)
    else:
        result = (total / mass[:, None]).to(out.dtype.element_ty)
    held = live[:, None] & (lane < HEAD_DIM)[None, :]
    tl.store(out + row[:, None] * HEAD_DIM + lane[None, :], result, mask=held)


@triton.jit(do_not_specialize=_COUNTS)
def merge_kernel(
    sums, peaks, query_start, context_lens, sinks, out,
    sequences, capacity, first_split, end_split, slots, by_sequence, window,
    QUERY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    SPLIT_KEYS: tl.constexpr, WINDOW_ROWS: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Grid (partial rows, query heads): the row's softmax over all splits up to end_split of which it sees keys.

    sums and peaks as attend_kernel writes them; out ``[N, Hq, D]`` if those are all that the row sees, else the last
    slot, where the next pass finds them. BLOCK_S splits are added up at a time, those of ``[i, i + 1) * BLOCK_S``,
    beginning with the first; first_split is a multiple of it.
    """
    part, head = tl.program_id(0), tl.program_id(1)
    if by_sequence != 0:
        sequence = part // WINDOW_ROWS
        token = tl.load(query_start + sequence) + part % WINDOW_ROWS
    else:
        sequence = _sequence_at(part, query_start, sequences, 1, 1, 0)
        token = part
    end = tl.load(query_start + sequence + 1)
    rows = end - tl.load(query_start + sequence)
    position = tl.load(context_lens + sequence) - end + token
    first, last = _splits_seen(position, capacity, window, SPLIT_KEYS, WINDOWED)
    if (token >= end) | (rows > WINDOW_ROWS) | (first == last) | (first >= end_split) | (last < first_split):
        return

    lane = tl.arange(0, BLOCK_D)
    slot = (part.to(tl.int64) * QUERY_HEADS + head) * slots
    before = slot + slots - 1
    peak = tl.full([], _LOWEST, tl.float32)
    mass = 0.0
    total = tl.zeros([BLOCK_D], tl.float32)
    if first < first_split:
        peak = tl.load(peaks + before * 2)
        mass = tl.load(peaks + before * 2 + 1)
        total = tl.load(sums + before * HEAD_DIM + lane, mask=lane < HEAD_DIM, other=0.0)
    begin_step = tl.maximum(first // BLOCK_S * BLOCK_S, first_split)
    for step in range(begin_step, tl.minimum(last + 1, end_split), BLOCK_S):
        split = step + tl.arange(0, BLOCK_S)
        seen = (split >= first) & (split <= last) & (split < end_split)
        found = slot + split - first_split
        part_peak = tl.load(peaks + found * 2, mask=seen, other=_LOWEST)
        part_mass = tl.load(peaks + found * 2 + 1, mask=seen, other=0.0)
        held = seen[:, None] & (lane < HEAD_DIM)[None, :]
        part_total = tl.load(sums + found[:, None] * HEAD_DIM + lane[None, :], mask=held, other=0.0)
        higher = tl.maximum(peak, tl.max(part_peak, 0))
        weight = tl.exp2(part_peak - higher)
        rescale = tl.exp2(peak - higher)
        mass = mass * rescale + tl.sum(part_mass * weight, 0)
        total = total * rescale + tl.sum(part_total * weight[:, None], 0)
        peak = higher
    if last < end_split:
        row = token.to(tl.int64) * QUERY_HEADS + head
        result = total / mass if sinks is None else total * _inverse_mass(tl.load(sinks + head), peak, mass)
        tl.store(out + row * HEAD_DIM + lane, result.to(out.dtype.element_ty), mask=lane < HEAD_DIM)
    else:
        tl.store(peaks + before * 2, peak)
        tl.store(peaks + before * 2 + 1, mass)
        tl.store(sums + before * HEAD_DIM + lane, total, mask=lane < HEAD_DIM)

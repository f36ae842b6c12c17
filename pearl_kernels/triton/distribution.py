"""From scanned slots to distributions: the two passes after ``statistics.scan_kernel``.

Settle finishes the slots that nothing cuts, and counts the others' values; collect finds their cutoffs. Which slots are
cut only the device knows: both passes are always launched, and a program without work returns after two loads. Tiles of
cut rows are read again, from L2 as a rule, where their maxima say that they matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pearl_kernels.triton.cutoff import LIVE, bin_of, bins_of_cutoff, fixed_mass, floor_of, load_inside, settle_cutoff
from pearl_kernels.triton.statistics import (
    BINS,
    CAPACITY,
    COLLECTED,
    CUT,
    CUTOFF,
    FOUND,
    GREEDY,
    GROUPS,
    INVERSE_TEMPERATURE,
    KIND,
    LOG_MASS,
    LOG_MIN_P,
    NO_TOKEN,
    PEAK,
    ROW,
    TILE,
    TILES_AT,
    TOKENS_AT,
    TOP_K,
    TOP_P,
    TOTAL,
    floats_of,
    ints_of,
    load_tile,
)


@triton.jit
def _finish(
    row, tokens, logprobs, record, numbers, slot, z, peak, total, vocab_size, TILES: tl.constexpr, SPAN: tl.constexpr
):
    """Write an uncut slot's distribution, and the winner of its tiles. z ``[SPAN]``: of the tiles' maxima."""
    tile = tl.arange(0, SPAN)
    score = z + tl.load(record + TILES_AT + 2 * SPAN + tile, tile < TILES, float("-inf"))
    winner = tl.load(numbers + TOKENS_AT + tile, tile < TILES, NO_TOKEN)
    token = tl.min(tl.where(score == tl.max(score), winner, NO_TOKEN))
    token = tl.where(token < vocab_size, token, 0)  # a row of NaNs has no winner
    log_mass = tl.log(total)
    logit = tl.load(row + token).to(tl.float32)
    logprob = (logit - peak) * tl.load(record + INVERSE_TEMPERATURE) - log_mass
    tl.store(record + CUTOFF, float("-inf"))
    tl.store(record + LOG_MASS, log_mass)
    tl.store(tokens + slot, token.to(tl.int64))
    tl.store(logprobs + slot, tl.where(tl.load(numbers + KIND) == GREEDY, 0.0, logprob))


@triton.jit(do_not_specialize=["tiles_per_program"])
def settle_kernel(
    logits,  # [.., stride]
    floats,
    ints,
    masses,
    tokens,  # int64 [slots], as logprobs (fp32) written for what is drawn already: slots that are not CUT
    logprobs,
    stride,
    vocab_size,
    tiles_per_program,
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
    MASS_BITS: tl.constexpr,
):
    """Program (s, i): slots without cuts are finished; for the others, tiles of the row are spread over bins."""
    slot = tl.program_id(0).to(tl.int64)
    record, numbers = floats_of(floats, slot, SPAN), ints_of(ints, slot, SPAN)
    index, kind = tl.load(numbers + ROW).to(tl.int64), tl.load(numbers + KIND)
    first_tile = tl.program_id(1) * tiles_per_program
    if (index < 0) | ((kind != CUT) & (first_tile > 0)):
        return
    row = logits + index * stride
    inverse = tl.load(record + INVERSE_TEMPERATURE)
    tiles = tl.arange(0, SPAN)
    maxima = tl.load(record + TILES_AT + tiles, tiles < TILES, float("-inf"))
    peak = tl.max(maxima)
    z = (maxima - peak) * inverse
    total = tl.sum(tl.load(record + TILES_AT + SPAN + tiles, tiles < TILES, 0.0) * tl.exp(z))
    if first_tile == 0:
        tl.store(record + PEAK, peak)
        tl.store(record + TOTAL, total)
    if kind != CUT:
        _finish(row, tokens, logprobs, record, numbers, slot, z, peak, total, vocab_size, TILES, SPAN)
        return
    groups = tl.arange(0, GROUPS * SPAN)
    maxima = tl.load(record + TILES_AT + 3 * SPAN + groups, groups < GROUPS * TILES, float("-inf"))
    top_k, top_p = tl.load(numbers + TOP_K), tl.load(record + TOP_P)
    floor = floor_of((maxima - peak) * inverse, top_k, top_p, tl.load(record + LOG_MIN_P), total, vocab_size)
    counts = numbers + TOKENS_AT + SPAN
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, TILES)):
        if (tl.load(record + TILES_AT + tile) - peak) * inverse >= floor:
            value = (load_tile(row, tile * TILE, vocab_size, TILE) - peak) * inverse
            counted = value >= floor
            value = tl.where(counted, value, 0.0)
            bin = bin_of(value, inverse)
            tl.atomic_add(counts + bin, tl.full([TILE], 1, tl.int32), counted, sem="relaxed")
            tl.atomic_add(masses + slot * BINS + bin, fixed_mass(value, MASS_BITS), counted, sem="relaxed")


@triton.jit(do_not_specialize=["tiles_per_program"])
def collect_kernel(
    logits,  # [.., stride]
    floats,
    ints,
    masses,
    stride,
    vocab_size,
    tiles_per_program,
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
    MASS_BITS: tl.constexpr,
):
    """Program (s, i): of a cut slot, collect from tiles of the row what is in the cutoff's bins.

    The last program of a slot to finish finds the cutoff among what all of them have collected.
    """
    slot = tl.program_id(0).to(tl.int64)
    record, numbers = floats_of(floats, slot, SPAN), ints_of(ints, slot, SPAN)
    index = tl.load(numbers + ROW).to(tl.int64)
    if (index < 0) | (tl.load(numbers + KIND) != CUT):
        return
    row, candidates = logits + index * stride, record + TILES_AT + (3 + GROUPS) * SPAN
    inverse, peak = tl.load(record + INVERSE_TEMPERATURE), tl.load(record + PEAK)
    top_k, top_p, log_min_p = tl.load(numbers + TOP_K), tl.load(record + TOP_P), tl.load(record + LOG_MIN_P)
    total = tl.load(record + TOTAL).to(tl.float64) * 2.0**MASS_BITS
    counts, masses = numbers + TOKENS_AT + SPAN, masses + slot * BINS
    first, last, by_k, by_p = bins_of_cutoff(counts, masses, top_k, top_p, log_min_p, total, inverse)
    first_tile = tl.program_id(1) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, TILES)):
        top = tl.maximum((tl.load(record + TILES_AT + tile) - peak) * inverse, LIVE)
        if bin_of(top, inverse) <= last:
            z, inside = load_inside(row, tile * TILE, vocab_size, peak, inverse, first, last, TILE)
            rank = tl.cumsum(inside.to(tl.int32), 0)
            at = tl.atomic_add(numbers + FOUND, tl.max(rank), sem="relaxed") + rank - 1
            tl.store(candidates + at, z, inside & (at < CAPACITY))
    tl.debug_barrier()  # what all threads have written comes before the report of one
    if tl.atomic_add(numbers + COLLECTED, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        source = (candidates, tl.load(numbers + FOUND), row, vocab_size, peak, inverse, first, last)
        settle_cutoff(record, numbers, source, counts, masses, by_k, by_p, MASS_BITS)

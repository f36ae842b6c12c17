"""One pass over rows of logits, the first step of ``sample`` and ``verify``: each tile's maximum, mass and winner.

A *slot* is a row with the parameters that make it a distribution. What is known of a slot lies in its records: 32-bit
floats, 32-bit integers, and 64-bit masses, at the offsets below. Tiles are reduced one by one and merged in order, so
that a result depends neither on how many tiles a program takes nor on the other rows of the batch.

z is ``(logit - peak) / temperature`` with the row's largest logit as peak, and 0 the largest z.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pearl_kernels.triton.philox import exponentials

TILE = tl.constexpr(2048)  # logits that a program holds in registers, 16 for each of its 128 threads
GROUPS = tl.constexpr(8)  # maxima kept of a tile of a cut row
BINS = tl.constexpr(1024)  # of the histogram that finds the cutoff
CAPACITY = tl.constexpr(4096)  # candidates for the cutoff that a record holds
NO_TOKEN = tl.constexpr(2**31 - 1)

# Kinds of slots.
GREEDY = tl.constexpr(0)  # temperature 0: the point mass on the first largest logit
UNCUT = tl.constexpr(1)
CUT = tl.constexpr(2)  # by top-k, top-p or min-p

# Offsets in a record of floats. SPAN is the number of tiles rounded up to a power of two.
INVERSE_TEMPERATURE = tl.constexpr(0)
TOP_P = tl.constexpr(1)
LOG_MIN_P = tl.constexpr(2)  # -inf: off
PEAK = tl.constexpr(3)
TOTAL = tl.constexpr(4)  # mass of the whole row: sum of exp(z)
CUTOFF = tl.constexpr(5)  # kept: z >= cutoff
LOG_MASS = tl.constexpr(6)  # log of the kept mass
TILES_AT = tl.constexpr(8)  # SPAN maxima, SPAN masses relative to them, SPAN scores; then GROUPS * SPAN group maxima

# Offsets in a record of integers.
ROW = tl.constexpr(0)  # of the logits; -1: the slot is idle
ENTRY = tl.constexpr(1)  # of the sampling parameters
KIND = tl.constexpr(2)
TOP_K = tl.constexpr(3)  # 0: off
FOUND = tl.constexpr(4)  # candidates for the cutoff
COLLECTED = tl.constexpr(5)  # programs that have finished collecting
DRAWN = tl.constexpr(6)  # programs that have finished drawing
TOKENS_AT = tl.constexpr(8)  # SPAN winners, then BINS counts


@triton.jit
def floats_of(floats, slot, SPAN: tl.constexpr):
    return floats + slot * (TILES_AT + (3 + GROUPS) * SPAN + CAPACITY)


@triton.jit
def ints_of(ints, slot, SPAN: tl.constexpr):
    return ints + slot * (TOKENS_AT + SPAN + BINS)


@triton.jit
def load_tile(row, first, vocab_size, WIDTH: tl.constexpr):
    """fp32 [WIDTH]: logits from ``first``; -inf, which has no probability, past the vocabulary and for NaN."""
    token = first + tl.arange(0, WIDTH)
    if first + WIDTH <= vocab_size:  # no mask, which would split vector loads where vocab_size is odd
        value = tl.load(row + token).to(tl.float32)
    else:
        value = tl.load(row + token, token < vocab_size, float("-inf")).to(tl.float32)
    return tl.where(value == value, value, float("-inf"))


@triton.jit
def race(weight, exponential, first, WIDTH: tl.constexpr):
    """Speed and token of the winner, the first if several; speed 0 if no weight is positive. weight ``[WIDTH]``."""
    speed = weight / exponential
    best = tl.max(speed)
    return best, tl.min(tl.where(speed == best, first + tl.arange(0, WIDTH), NO_TOKEN))


@triton.jit
def request_of(row, row_start, requests):
    """The request whose rows include this one; -1 if none does."""
    before = 0  # requests that end at or before this row
    for first in range(0, requests, 1024):
        request = first + tl.arange(0, 1024)
        end = tl.load(row_start + 1 + request, request < requests, NO_TOKEN)
        before += tl.sum((end <= row).to(tl.int32))
    return tl.where((before < requests) & (row >= tl.load(row_start)), before, -1)


@triton.jit
def _describe(
    record, numbers, masses, row, entry, kind, top_k, top_p, min_p, inverse, SPAN: tl.constexpr
):  # record: of floats, numbers: of integers
    """Write what the following kernels need of the slot's parameters, and clear what they count in."""
    tl.store(record + INVERSE_TEMPERATURE, inverse)
    tl.store(record + TOP_P, top_p)
    tl.store(record + LOG_MIN_P, tl.log(min_p))
    tl.store(numbers + ROW, row.to(tl.int32))
    tl.store(numbers + ENTRY, entry.to(tl.int32))
    tl.store(numbers + KIND, kind)
    tl.store(numbers + TOP_K, top_k)
    tl.store(numbers + FOUND, 0)
    tl.store(numbers + COLLECTED, 0)
    tl.store(numbers + DRAWN, 0)
    if kind == CUT:
        bin = tl.arange(0, BINS)
        tl.store(numbers + TOKENS_AT + SPAN + bin, tl.zeros([BINS], tl.int32))
        tl.store(masses + bin, tl.zeros([BINS], tl.int64))


@triton.jit(do_not_specialize=["tiles_per_program", "requests", "stream"])
def scan_kernel(
    logits,  # [.., stride]
    rows,  # int32 [slots]: row of each slot, -1: none; or None: slot s has row s
    row_start,  # int32 [requests + 1]: the entry of slot s is the request whose rows include s; or None: s
    temperature,  # [entries], as the four that follow
    top_k,
    top_p,
    min_p,
    seed,
    positions,  # int64, of each row; or None
    floats,
    ints,
    masses,  # int64 [slots, BINS]
    stride,
    vocab_size,
    tiles_per_program,
    requests,
    stream,
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Program (s, i): tiles ``i * tiles_per_program ..`` of slot s. Given positions, uncut rows are drawn as well."""
    slot = tl.program_id(0).to(tl.int64)
    record, numbers = floats_of(floats, slot, SPAN), ints_of(ints, slot, SPAN)
    row, entry = slot, slot
    if rows is not None:
        row = tl.load(rows + slot).to(tl.int64)
    if row_start is not None:
        entry = request_of(slot, row_start, requests).to(tl.int64)
    if (row < 0) | (entry < 0):
        tl.store(numbers + ROW, -1)
        return
    heat = tl.load(temperature + entry)
    k, p, m = tl.load(top_k + entry), tl.load(top_p + entry), tl.load(min_p + entry)
    k = tl.where((k > 0) & (k < vocab_size), k, 0)
    kind = tl.where(heat > 0, tl.where((k > 0) | (p < 1) | (m > 0), CUT, UNCUT), GREEDY)
    inverse = 1.0 / tl.where(heat > 0, heat, 1.0)
    first_tile = tl.program_id(1) * tiles_per_program
    if first_tile == 0:
        _describe(record, numbers, masses + slot * BINS, row, entry, kind, k, p, m, inverse, SPAN)
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, TILES)):
        first = tile * TILE
        value = load_tile(logits + row * stride, first, vocab_size, TILE)
        group = tl.max(tl.reshape(value, [GROUPS, TILE // GROUPS]), 1)
        peak = tl.max(group, 0)
        weight = tl.exp((value - tl.where(peak > float("-inf"), peak, 0.0)) * inverse)
        tl.store(record + TILES_AT + tile, peak)
        tl.store(record + TILES_AT + SPAN + tile, tl.sum(weight))
        score, token = 0.0, NO_TOKEN
        if kind == CUT:
            tl.store(record + TILES_AT + 3 * SPAN + tile * GROUPS + tl.arange(0, GROUPS), group)
        elif kind == GREEDY:
            token = tl.min(tl.where(value == peak, first + tl.arange(0, TILE), NO_TOKEN))
        elif positions is not None:
            noise = exponentials(tl.load(seed + entry), tl.load(positions + row), stream, first, TILE)
            speed, token = race(weight, noise, first, TILE)
            score = tl.log(speed)
        tl.store(record + TILES_AT + 2 * SPAN + tile, score)
        tl.store(numbers + TOKENS_AT + tile, token)

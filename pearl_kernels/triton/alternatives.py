"""The alternatives of ``sample`` in Triton: what comes next after each row's drawn token.

Two launches after the draw, and only where alternatives are asked for. Rank finds the best of each tile while the tile
is in registers, a maximum at a time; merge does the same with what the tiles of a row have left, 8 values each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels.reference import MOST_ALTERNATIVES, Alternatives, SamplingTensors, Stream
from pearl_kernels.triton.launch import WARPS, Distributions, Plan, variant
from pearl_kernels.triton.philox import exponentials
from pearl_kernels.triton.statistics import (
    CUTOFF,
    ENTRY,
    GREEDY,
    INVERSE_TEMPERATURE,
    KIND,
    LOG_MASS,
    NO_TOKEN,
    PEAK,
    ROW,
    TILE,
    floats_of,
    ints_of,
    load_tile,
)
from pearl_kernels.triton.variants import Variant


@triton.jit
def _take_best(rank, token):
    """The largest rank, its token, the first if several (NO_TOKEN if all are -inf), and the ranks without it."""
    best = tl.max(rank)
    taken = tl.min(tl.where((rank == best) & (rank > float("-inf")), token, NO_TOKEN))
    return best, taken, tl.where(token == taken, float("-inf"), rank)


@triton.jit(do_not_specialize=["tiles_per_program", "stream"])
def rank_kernel(
    logits,  # [.., stride]
    seed,  # int64 [entries]
    positions,  # int64, of each row
    tokens,  # int64 [slots]: drawn
    floats,
    ints,
    ranks,  # fp32 [slots, COUNT, SPAN]: of each tile's best
    winners,  # int32 [slots, COUNT, SPAN]: their tokens
    drawn_scores,  # fp32 [slots]
    stride,
    vocab_size,
    tiles_per_program,
    stream,
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
    COUNT: tl.constexpr,
    BY_NOISE: tl.constexpr,
):
    """Program (s, i): the best of each of its tiles of slot s.

    BY_NOISE: rows that are not greedy rank by log-probability + noise. Others rank by their logits, which order as
    their probabilities do, without rounding.
    """
    slot = tl.program_id(0).to(tl.int64)
    record, numbers = floats_of(floats, slot, SPAN), ints_of(ints, slot, SPAN)
    index, drawn = tl.load(numbers + ROW).to(tl.int64), tl.load(tokens + slot).to(tl.int32)
    inverse, peak = tl.load(record + INVERSE_TEMPERATURE), tl.load(record + PEAK)
    cutoff, log_mass = tl.load(record + CUTOFF), tl.load(record + LOG_MASS)
    greedy = tl.load(numbers + KIND) == GREEDY
    sound = (peak - peak) == 0  # finite
    cutoff = tl.where(sound, cutoff, float("inf"))  # of no distribution nothing is kept
    first_tile = tl.program_id(1) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, TILES)):
        first = tile * TILE
        token = first + tl.arange(0, TILE)
        value = load_tile(logits + index * stride, first, vocab_size, TILE)
        z = (value - peak) * inverse
        score, rank = z - log_mass, value
        if BY_NOISE:
            entry = tl.load(numbers + ENTRY)
            arrival = exponentials(tl.load(seed + entry), tl.load(positions + index), stream, first, TILE)
            score = tl.where(greedy, score, score - tl.log(arrival))
            rank = tl.where(greedy, value, score)
        if (drawn >= first) & (drawn < first + TILE):
            own = tl.sum(tl.where(token == drawn, score, 0.0))
            tl.store(drawn_scores + slot, tl.where(sound, own, float("nan")))
        kept = (value > float("-inf")) & (z >= cutoff) & (token != drawn)
        rank = tl.where(kept, rank, float("-inf"))
        place = slot * COUNT * SPAN + tile
        for _ in range(COUNT):
            best, taken, rank = _take_best(rank, token)
            tl.store(ranks + place, best)
            tl.store(winners + place, taken)
            place += SPAN


@triton.jit
def merge_kernel(
    floats,
    ints,
    ranks,
    winners,
    alternatives,  # int64 [slots, COUNT]
    scores,  # fp32 [slots, COUNT]
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,  # COUNT rounded up to a power of two
    BY_NOISE: tl.constexpr,
):
    """Program s: the best of slot s, from those of its tiles."""
    slot = tl.program_id(0).to(tl.int64)
    record, numbers = floats_of(floats, slot, SPAN), ints_of(ints, slot, SPAN)
    inverse, peak = tl.load(record + INVERSE_TEMPERATURE), tl.load(record + PEAK)
    log_mass = tl.load(record + LOG_MASS)
    by_logit = tl.load(numbers + KIND) == GREEDY
    if not BY_NOISE:
        by_logit = True
    at = tl.arange(0, ROWS * SPAN)
    there = (at < COUNT * SPAN) & (at % SPAN < TILES)
    rank = tl.load(ranks + slot * COUNT * SPAN + at, there, float("-inf"))
    token = tl.load(winners + slot * COUNT * SPAN + at, there, NO_TOKEN)
    for i in range(COUNT):
        best, taken, rank = _take_best(rank, token)
        found = taken != NO_TOKEN
        score = tl.where(by_logit, (best - peak) * inverse - log_mass, best)
        tl.store(alternatives + slot * COUNT + i, tl.where(found, taken, -1).to(tl.int64))
        tl.store(scores + slot * COUNT + i, tl.where(found, score, float("-inf")))


def rank(
    plan: Plan,
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    drawn: Distributions,
    stream: Stream,
    made: Alternatives,
) -> None:
    """Fills ``made``. drawn: of the same plan and rows, with a token of each."""
    count = made.tokens.shape[1]
    ranks = logits.new_empty((plan.slots, count, plan.span), dtype=torch.float32)
    winners = logits.new_empty((plan.slots, count, plan.span), dtype=torch.int32)
    records, fixed = (drawn.floats, drawn.ints), {**plan.constants, "COUNT": count, "BY_NOISE": stream == Stream.SAMPLE}
    size = logits.stride(0), plan.vocab_size, plan.tiles_per_program, int(stream)
    inputs = logits, params.seed, positions, drawn.tokens
    rank_kernel[plan.grid](*inputs, *records, ranks, winners, made.drawn, *size, **fixed, num_warps=WARPS)
    rows = 1 << (count - 1).bit_length()
    merge_kernel[(plan.slots,)](*records, ranks, winners, made.tokens, made.scores, ROWS=rows, **fixed, num_warps=WARPS)


def variants(dtype: str) -> tuple[Variant, ...]:
    """For logits of this dtype."""
    most: dict[str, object] = {"COUNT": MOST_ALTERNATIVES}
    return tuple(
        variant(f"sample-rank_{name}-{dtype}", rank_kernel, dtype, {**most, "BY_NOISE": by_noise})
        for name, by_noise in (("noise", True), ("logits", False))
    )


MERGE = tuple(
    variant(
        f"sample-merge_{name}",
        merge_kernel,
        "bf16",
        {"COUNT": MOST_ALTERNATIVES, "ROWS": MOST_ALTERNATIVES, "BY_NOISE": by_noise},
    )
    for name, by_noise in (("noise", True), ("logits", False))
)

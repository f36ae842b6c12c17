"""``sample`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.sampling``.

Four launches: scan, settle, collect (``distribution``), draw; two more where alternatives are asked for. A row that
nothing cuts is drawn while it is scanned, for every logit is read once, and finished by settle; a cut row is drawn
last, from the tiles that hold what it keeps. A drawn logit costs about 65 instructions, a third of them Philox's:
below two thirds of an H100's bandwidth for fp32 logits, arithmetic is the limit, not memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels.operands import check_logits, check_sampling, new_alternatives
from pearl_kernels.reference import Sampled, SamplingTensors, Stream
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.alternatives import MERGE, rank
from pearl_kernels.triton.alternatives import variants as rank_variants
from pearl_kernels.triton.distribution import collect_kernel, settle_kernel
from pearl_kernels.triton.launch import WARPS, Distributions, Plan, distributions, make_plan, variant
from pearl_kernels.triton.philox import exponentials
from pearl_kernels.triton.statistics import (
    CUT,
    CUTOFF,
    DRAWN,
    ENTRY,
    INVERSE_TEMPERATURE,
    KIND,
    LOG_MASS,
    NO_TOKEN,
    PEAK,
    ROW,
    TILE,
    TILES_AT,
    TOKENS_AT,
    floats_of,
    ints_of,
    load_tile,
    race,
    scan_kernel,
)
from pearl_kernels.triton.variants import Variant


@triton.jit(do_not_specialize=["tiles_per_program", "stream"])
def draw_kernel(
    logits,  # [.., stride]
    seed,  # int64 [entries]
    positions,  # int64, of each row
    floats,
    ints,
    tokens,  # int64 [slots], as logprobs (fp32) written for cut slots
    logprobs,
    stride,
    vocab_size,
    tiles_per_program,
    stream,
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Program (s, i): of a cut slot, the winners of its tiles; the last program to finish finds the winner of all."""
    slot = tl.program_id(0).to(tl.int64)
    record, numbers = floats_of(floats, slot, SPAN), ints_of(ints, slot, SPAN)
    index = tl.load(numbers + ROW).to(tl.int64)
    if (index < 0) | (tl.load(numbers + KIND) != CUT):
        return
    row = logits + index * stride
    inverse, peak = tl.load(record + INVERSE_TEMPERATURE), tl.load(record + PEAK)
    cutoff = tl.load(record + CUTOFF)
    entry = tl.load(numbers + ENTRY)
    key, position = tl.load(seed + entry), tl.load(positions + index)
    speeds, winners = record + TILES_AT + 2 * SPAN, numbers + TOKENS_AT
    first_tile = tl.program_id(1) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, TILES)):
        speed, token = 0.0, NO_TOKEN
        if (tl.load(record + TILES_AT + tile) - peak) * inverse >= cutoff:
            first = tile * TILE
            z = (load_tile(row, first, vocab_size, TILE) - peak) * inverse
            weight = tl.where(z >= cutoff, tl.exp(z), 0.0)
            speed, token = race(weight, exponentials(key, position, stream, first, TILE), first, TILE)
        tl.store(speeds + tile, speed)
        tl.store(winners + tile, token)
    tl.debug_barrier()  # what all threads have written comes before the report of one
    if tl.atomic_add(numbers + DRAWN, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        token = winner_of(speeds, winners, TILES, SPAN)
        token = tl.where(token < vocab_size, token, 0)  # a row of NaNs has no winner
        z = (tl.load(row + token).to(tl.float32) - peak) * inverse
        tl.store(tokens + slot, token.to(tl.int64))
        tl.store(logprobs + slot, z - tl.load(record + LOG_MASS))


@triton.jit
def winner_of(speeds, winners, TILES: tl.constexpr, SPAN: tl.constexpr):
    """The token of the fastest tile, the first if several; NO_TOKEN if no speed is positive."""
    tile = tl.arange(0, SPAN)
    speed = tl.load(speeds + tile, tile < TILES, 0.0)
    token = tl.load(winners + tile, tile < TILES, NO_TOKEN)
    best = tl.max(speed)
    return tl.where(best > 0, tl.min(tl.where(speed == best, token, NO_TOKEN)), NO_TOKEN)


def sample(
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    vocab_size: int,
    stream: Stream = Stream.SAMPLE,
    alternatives: int = 0,
) -> Sampled:
    op, n = "sample", logits.shape[0]
    checks = CHECKS.beside(op, "logits", logits)
    check_logits(checks, op, "logits", logits, vocab_size)
    check_sampling(checks, op, params, n)
    checks.contiguous(op, "positions", positions, torch.int64, (n,))
    ranked = new_alternatives(op, logits, alternatives)
    if n == 0:
        return Sampled(logits.new_empty(0, dtype=torch.int64), logits.new_empty(0, dtype=torch.float32), ranked)
    plan = make_plan(n, vocab_size)
    drawn = draw(plan, logits, params, positions, stream=stream)
    if ranked is not None:
        rank(plan, logits, params, positions, drawn, stream, ranked)
    return Sampled(drawn.tokens, drawn.logprobs, ranked)


def draw(
    plan: Plan,
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    row_start: Tensor | None = None,
    stream: Stream = Stream.SAMPLE,
) -> Distributions:
    """A draw from each row's distribution. row_start: params belong to requests, not to rows."""
    made = distributions(plan, logits, params, positions, row_start=row_start, stream=stream)
    tensors = logits, params.seed, positions, made.floats, made.ints, made.tokens, made.logprobs
    size = logits.stride(0), plan.vocab_size, plan.tiles_per_program, int(stream)
    draw_kernel[plan.grid](*tensors, *size, **plan.constants, num_warps=WARPS)
    return made


def _variants(dtype: str) -> tuple[Variant, ...]:
    return (
        variant(f"sample-scan-{dtype}", scan_kernel, dtype, {"rows": None, "row_start": None}),
        variant(f"sample-settle-{dtype}", settle_kernel, dtype),
        variant(f"sample-collect-{dtype}", collect_kernel, dtype),
        variant(f"sample-draw-{dtype}", draw_kernel, dtype),
        *rank_variants(dtype),
    )


VARIANTS = (*(made for dtype in ("bf16", "fp16", "fp32") for made in _variants(dtype)), *MERGE)

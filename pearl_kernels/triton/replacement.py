"""What takes a failed token's place, in Triton: one row of each request, by an exponential race.

The residual exists in registers only. Where it is zero everywhere p is drawn from.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels.reference import Stream
from pearl_kernels.triton.drafted import describe_draft, residual_of
from pearl_kernels.triton.launch import WARPS, Distributions, Plan
from pearl_kernels.triton.philox import exponentials
from pearl_kernels.triton.sampling import winner_of
from pearl_kernels.triton.statistics import (
    CUTOFF,
    INVERSE_TEMPERATURE,
    NO_TOKEN,
    PEAK,
    TILE,
    TILES_AT,
    floats_of,
    race,
)

_SAMPLE, _RESIDUAL = (tl.constexpr(int(s)) for s in (Stream.SAMPLE, Stream.RESIDUAL))


@triton.jit(do_not_specialize=["tiles_per_program"])
def race_kernel(
    logits,  # [N, stride]
    draft_logits,  # [Q, draft_stride]
    draft_tokens,  # int64 [N]
    positions,  # int64 [N]
    seed,  # int64 [R]
    floats,  # records of the N rows
    draft_floats,  # records of the drafts of failed tokens, one for each request; or, given weights, for each row
    draft_ints,
    draft_drawn,  # int64, of each such record: where the draft is greedy, its token
    weights,  # fp32 [R]: what p is weighted with, under the block rule; or None: 1
    failed,  # int32 [R], as failed_draft and finished: of the kernel that decides
    failed_draft,
    finished,
    speeds,  # fp32 [R, 2 * SPAN]: of the tiles' winners by max(p - q, 0), and where that is zero, by p
    winners,  # int32 [R, 2 * SPAN]
    next_token,  # int64 [R]
    stride,
    draft_stride,
    vocab_size,
    tiles_per_program,
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Program (r, i): draw what takes the place of request r's failed token: from max(weight p - q, 0), else from p."""
    request = tl.program_id(0).to(tl.int64)
    index = tl.load(failed + request).to(tl.int64)
    if index < 0:
        return
    record = floats_of(floats, index, SPAN)
    inverse, peak = tl.load(record + INVERSE_TEMPERATURE), tl.load(record + PEAK)
    cutoff = tl.load(record + CUTOFF)
    certain = tl.load(draft_tokens + index).to(tl.int32)  # q is the point mass on it; -1, a bonus row, has no q
    stream = tl.where(certain < 0, _SAMPLE, _RESIDUAL)
    draft_index = tl.load(failed_draft + request).to(tl.int64)
    slot, weight = request, 1.0
    if weights is not None:
        slot, weight = index, tl.load(weights + request)
    draft_row, draft_record = draft_logits + draft_index * draft_stride, floats_of(draft_floats, slot, SPAN)
    spread, certain = describe_draft(certain, draft_index, draft_floats, draft_ints, draft_drawn, slot, SPAN)
    key, position = tl.load(seed + request), tl.load(positions + index)
    speeds, winners = speeds + request * 2 * SPAN, winners + request * 2 * SPAN
    first_tile = tl.program_id(1) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, TILES)):
        speed, token, fallback_speed, fallback = 0.0, NO_TOKEN, 0.0, NO_TOKEN
        if (tl.load(record + TILES_AT + tile) - peak) * inverse >= cutoff:
            first = tile * TILE
            row = logits + index * stride
            p, residual = residual_of(row, record, draft_row, draft_record, spread, certain, weight, first, vocab_size)
            arrival = exponentials(key, position, stream, first, TILE)
            speed, token = race(residual, arrival, first, TILE)
            if speed == 0:
                fallback_speed, fallback = race(p, arrival, first, TILE)
        tl.store(speeds + tile, speed)
        tl.store(winners + tile, token)
        tl.store(speeds + SPAN + tile, fallback_speed)
        tl.store(winners + SPAN + tile, fallback)
    tl.debug_barrier()  # what all threads have written comes before the report of one
    if tl.atomic_add(finished + request, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        token = winner_of(speeds, winners, TILES, SPAN)
        if token == NO_TOKEN:  # the residual is zero everywhere
            token = winner_of(speeds + SPAN, winners + SPAN, TILES, SPAN)
        tl.store(next_token + request, tl.where(token < vocab_size, token, 0))


class OpenRows(NamedTuple):
    """The one row of each request whose token remains to be drawn; as ``verification.decide_kernel`` says."""

    failed: Tensor
    failed_draft: Tensor
    finished: Tensor

    @classmethod
    def of(cls, logits: Tensor, requests: int) -> OpenRows:
        """Uninitialised."""
        return cls(*logits.new_empty((3, -(-requests // 4) * 4), dtype=torch.int32))


def replace_failed(
    plan: Plan,
    logits: Tensor,
    draft_logits: Tensor,
    draft_tokens: Tensor,
    positions: Tensor,
    seed: Tensor,
    target: Distributions,
    draft: Distributions,
    open_rows: OpenRows,
    next_token: Tensor,
    weights: Tensor | None = None,
) -> None:
    """plan: of as many slots as there are requests. Where open_rows names no row of draft_logits, neither is read."""
    speeds = logits.new_empty((plan.slots, 2 * plan.span), dtype=torch.float32)
    winners = logits.new_empty((plan.slots, 2 * plan.span), dtype=torch.int32)
    race_kernel[plan.grid](
        *(logits, draft_logits, draft_tokens, positions, seed),
        *(target.floats, draft.floats, draft.ints, draft.tokens, weights, *open_rows, speeds, winners, next_token),
        *(logits.stride(0), draft_logits.stride(0), plan.vocab_size, plan.tiles_per_program),
        **plan.constants,
        num_warps=WARPS,
    )

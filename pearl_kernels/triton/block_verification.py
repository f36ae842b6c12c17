"""The block rule of ``verify`` in Triton; the formulas are in ``pearl_kernels.reference.verification``.

Target and draft rows become distributions at once. Then weigh follows each request's tokens, spare sums
max(weight P - Q, 0) of every row behind them, decide finds where each request ends, and what takes the token's place is
drawn as under rejection. Most rows of both models are read twice, or three times where they are cut. Launches: 10, or 7
where every draft is a point mass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels.reference import SamplingTensors, Stream, Verdict
from pearl_kernels.triton.drafted import describe_draft, ratios, residual_of
from pearl_kernels.triton.launch import WARPS, Plan, distributions, make_plan, variant
from pearl_kernels.triton.philox import uniform
from pearl_kernels.triton.replacement import OpenRows, race_kernel, replace_failed
from pearl_kernels.triton.statistics import (
    CUTOFF,
    GREEDY,
    INVERSE_TEMPERATURE,
    KIND,
    PEAK,
    TILE,
    TILES_AT,
    floats_of,
    ints_of,
    request_of,
    scan_kernel,
)
from pearl_kernels.triton.variants import Variant

_ACCEPT = tl.constexpr(int(Stream.ACCEPT))
_DECIDE_WARPS = 1


@triton.jit
def weigh_kernel(
    logits,  # [N, stride]
    draft_tokens,  # int64 [N]
    row_start,  # int32 [R + 1]
    draft_logprobs,  # fp32 [N] or None: log q is 0
    floats,  # records of the N rows
    ints,
    weights,  # fp32 [N]: of the tokens up to that of each row; 0 where none is tested in a block
    stride,
    vocab_size,
    SPAN: tl.constexpr,
):
    """Program r: the weights of request r's tokens, one after the other."""
    request = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(row_start + request).to(tl.int64), tl.load(row_start + request + 1).to(tl.int64)
    weight = 1.0
    for row in range(begin, end):
        drafted, kind = tl.load(draft_tokens + row), tl.load(ints_of(ints, row, SPAN) + KIND)
        tested = (drafted >= 0) & (drafted < vocab_size) & (kind != GREEDY)
        product = weight * ratios(logits, draft_logprobs, row, drafted, tested, floats, stride, SPAN)
        weight = tl.where(product > 0, tl.minimum(product, 1.0), 0.0)  # a NaN is a token that nobody drafts
        tl.store(weights + row, weight)


@triton.jit(do_not_specialize=["tiles_per_program", "requests"])
def spare_kernel(
    logits,  # [N, stride]
    draft_logits,  # [Q, draft_stride]
    draft_tokens,  # int64 [N]
    row_start,  # int32 [R + 1]
    draft_rows,  # int32 [N], -1: q is the point mass on the token
    floats,  # records of the N rows, and those of their drafts
    draft_floats,
    draft_ints,
    draft_drawn,  # int64 [N]: where the draft is greedy, its token
    weights,  # fp32 [N], of weigh_kernel
    spares,  # fp32 [N, SPAN]: sum of max(weight p - q, 0) in each tile, weight that of the row before
    stride,
    draft_stride,
    vocab_size,
    tiles_per_program,
    requests,
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Program (n, i): of its tiles of row n, if this tests a token that comes after others that have a weight."""
    row = tl.program_id(0).to(tl.int64)
    request = request_of(row, row_start, requests)
    certain = tl.load(draft_tokens + row).to(tl.int32)
    if (request < 0) | (certain < 0):
        return
    if row == tl.load(row_start + request):
        return
    weight = tl.load(weights + row - 1)
    if weight == 0:
        return
    record, draft_record = floats_of(floats, row, SPAN), floats_of(draft_floats, row, SPAN)
    draft_index = tl.load(draft_rows + row).to(tl.int64)
    draft_row = draft_logits + draft_index * draft_stride
    spread, certain = describe_draft(certain, draft_index, draft_floats, draft_ints, draft_drawn, row, SPAN)
    inverse, peak = tl.load(record + INVERSE_TEMPERATURE), tl.load(record + PEAK)
    cutoff = tl.load(record + CUTOFF)
    first_tile = tl.program_id(1) * tiles_per_program
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_program, TILES)):
        spare = 0.0
        if (tl.load(record + TILES_AT + tile) - peak) * inverse >= cutoff:  # else p is 0 in all of it
            first = tile * TILE
            _, residual = residual_of(
                logits + row * stride, record, draft_row, draft_record, spread, certain, weight, first, vocab_size
            )
            spare = tl.sum(residual)
        tl.store(spares + row * SPAN + tile, spare)


@triton.jit
def decide_blocks_kernel(
    draft_tokens,  # int64 [N]
    row_start,  # int32 [R + 1]
    positions,  # int64 [N]
    seed,  # int64 [R]
    draft_rows,  # int32 [N]
    floats,  # records of the N rows
    ints,
    drawn,  # int64 [N]: the target's own token, of greedy rows
    weights,  # fp32 [N], of weigh_kernel
    spares,  # fp32 [N, SPAN], of spare_kernel
    accepted,  # int32 [R], and what follows as of verification.decide_kernel
    next_token,  # int64 [R]
    failed,  # int32 [R]
    failed_draft,  # int32 [R]
    finished,  # int32 [R]
    open_weights,  # fp32 [R]: of the tokens that hold; 1 for a bonus row
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Program r: how far request r's block holds, or a greedy request's tokens."""
    request = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(row_start + request).to(tl.int64), tl.load(row_start + request + 1).to(tl.int64)
    tile = tl.arange(0, SPAN)
    greedy, last, held, holds = False, end, begin, True
    if begin < end:
        greedy = tl.load(ints_of(ints, begin, SPAN) + KIND) == GREEDY
        last = tl.where(tl.load(draft_tokens + end - 1) < 0, end - 1, end)
    for row in range(begin, last):
        if greedy:
            holds = holds & (tl.load(drawn + row) == tl.load(draft_tokens + row))
        else:
            weight = tl.load(weights + row)
            share = weight
            if (row + 1 < last) & (weight > 0):
                peak = tl.load(floats_of(floats, row + 1, SPAN) + PEAK)
                if (peak - peak) == 0:  # a row that is no distribution ends the block before it
                    spare = tl.sum(tl.load(spares + (row + 1) * SPAN + tile, tile < TILES, 0.0))
                    left = spare + 1.0 - weight
                    share = tl.where(left > 0, spare / left, 1.0)
            holds = uniform(tl.load(seed + request), tl.load(positions + row), _ACCEPT) < share
        held = tl.where(holds, row + 1, held)
    tl.store(accepted + request, (held - begin).to(tl.int32))
    token, open_row, draft_row, weight = -1, end * 0 - 1, -1, 1.0
    if held < end:
        if greedy:
            token = tl.load(drawn + held).to(tl.int32)
        else:
            open_row = held
            if held < last:
                draft_row = tl.load(draft_rows + held)
                if held > begin:
                    weight = tl.load(weights + held - 1)
    tl.store(next_token + request, token)
    tl.store(failed + request, open_row.to(tl.int32))
    tl.store(failed_draft + request, draft_row)
    tl.store(finished + request, 0)
    tl.store(open_weights + request, weight)


def judge_blocks(
    plan: Plan,
    logits: Tensor,
    draft_tokens: Tensor,
    row_start: Tensor,
    positions: Tensor,
    params: SamplingTensors,
    draft_logprobs: Tensor | None,
    draft_logits: Tensor | None,
    draft_rows: Tensor | None,
    draft_temperature: Tensor | None,
) -> Verdict:
    """plan: of as many slots as logits has rows, at least one; of at least one request."""
    requests = row_start.shape[0] - 1
    target = distributions(plan, logits, params, row_start=row_start)
    rows, q_logits, q = torch.full_like(draft_tokens, -1, dtype=torch.int32), logits, target
    if draft_logits is not None and draft_rows is not None and draft_temperature is not None:
        named = (draft_tokens >= 0) & (draft_rows < draft_logits.shape[0])
        rows = torch.where(named, draft_rows, rows)
        drafter = replace(params, temperature=draft_temperature)
        q_logits, q = draft_logits, distributions(plan, draft_logits, drafter, rows=rows, row_start=row_start)
    weights = logits.new_empty(plan.slots, dtype=torch.float32)
    spares = logits.new_empty((plan.slots, plan.span), dtype=torch.float32)
    open_weights = logits.new_empty(requests, dtype=torch.float32)
    open_rows, size = OpenRows.of(logits, requests), (logits.stride(0), plan.vocab_size)
    verdict = Verdict(logits.new_empty(requests, dtype=torch.int32), logits.new_empty(requests, dtype=torch.int64))
    records = target.floats, target.ints
    weigh_kernel[(requests,)](
        *(logits, draft_tokens, row_start, draft_logprobs, *records, weights, *size),
        SPAN=plan.span,
        num_warps=_DECIDE_WARPS,
    )
    spare_kernel[plan.grid](
        *(logits, q_logits, draft_tokens, row_start, rows, target.floats, q.floats, q.ints, q.tokens),
        *(weights, spares, logits.stride(0), q_logits.stride(0), plan.vocab_size, plan.tiles_per_program, requests),
        **plan.constants,
        num_warps=WARPS,
    )
    decide_blocks_kernel[(requests,)](
        *(draft_tokens, row_start, positions, params.seed, rows, *records, target.tokens, weights, spares),
        *(*verdict, *open_rows, open_weights),
        **plan.constants,
        num_warps=_DECIDE_WARPS,
    )
    last, inputs = make_plan(requests, plan.vocab_size), (logits, q_logits, draft_tokens, positions, params.seed)
    replace_failed(last, *inputs, target, q, open_rows, verdict.next_token, weights=open_weights)
    return verdict


def variants(dtype: str) -> tuple[Variant, ...]:
    """For logits of this dtype."""
    return (
        variant(f"verify-scan_draft_rows-{dtype}", scan_kernel, dtype, {"positions": None}),
        variant(f"verify-weigh-{dtype}", weigh_kernel, dtype, num_warps=_DECIDE_WARPS),
        variant(f"verify-spare-{dtype}", spare_kernel, dtype),
        variant(f"verify-race_block-{dtype}", race_kernel, dtype),
    )


DECIDE = variant("verify-decide_blocks", decide_blocks_kernel, "bf16", num_warps=_DECIDE_WARPS)

"""A drafted token against the target's slot, in Triton: p / q, and the rest max(weight p - q, 0) behind it."""

from __future__ import annotations

import triton
import triton.language as tl

from pearl_kernels.triton.statistics import (
    CUTOFF,
    GREEDY,
    INVERSE_TEMPERATURE,
    KIND,
    LOG_MASS,
    PEAK,
    TILE,
    floats_of,
    ints_of,
    load_tile,
)


@triton.jit
def ratios(logits, draft_logprobs, row, drafted, tested, floats, stride, SPAN: tl.constexpr):
    """p / q of tokens drafted at rows (one or many) whose slots are not greedy; 0 of what is cut, or not tested."""
    record = floats_of(floats, row, SPAN)
    logit = tl.load(logits + row * stride + drafted, tested, float("-inf")).to(tl.float32)
    z = (logit - tl.load(record + PEAK, tested, 0.0)) * tl.load(record + INVERSE_TEMPERATURE, tested, 1.0)
    log_ratio = z - tl.load(record + LOG_MASS, tested, 0.0)
    if draft_logprobs is not None:  # else log q is 0
        log_ratio -= tl.load(draft_logprobs + row, tested, 0.0)
    return tl.where(tested & (z >= tl.load(record + CUTOFF, tested, 0.0)), tl.exp(log_ratio), 0.0)


@triton.jit
def describe_draft(certain, draft_index, draft_floats, draft_ints, draft_drawn, slot, SPAN: tl.constexpr):
    """Whether q has no point mass, and the token that it has one on, -1: none, q is 0.

    certain: the drafted token, which q is the point mass on if there is no row of it (draft_index < 0).
    """
    spread = draft_index >= 0
    if spread:
        spread = tl.load(ints_of(draft_ints, slot, SPAN) + KIND) != GREEDY
        certain = tl.where(spread, -1, tl.load(draft_drawn + slot).to(tl.int32))
        peak = tl.load(floats_of(draft_floats, slot, SPAN) + PEAK)
        spread = spread & ((peak - peak) == 0)  # else it is no distribution, and q is 0
    return spread, certain


@triton.jit
def residual_of(row, record, draft_row, draft_record, spread, certain, weight, first, vocab_size):
    """fp32 [TILE], of the tokens from ``first``: p, and max(weight p - q, 0)."""
    p = _probabilities(row, record, first, vocab_size)
    q = tl.where(first + tl.arange(0, TILE) == certain, 1.0, 0.0)
    if spread:
        q = _probabilities(draft_row, draft_record, first, vocab_size)
    return p, tl.maximum(weight * p - q, 0.0)


@triton.jit
def _probabilities(row, record, first, vocab_size):
    """fp32 [TILE]: of the tokens from ``first`` in a slot that is not greedy. record: of floats."""
    z = (load_tile(row, first, vocab_size, TILE) - tl.load(record + PEAK)) * tl.load(record + INVERSE_TEMPERATURE)
    return tl.where(z >= tl.load(record + CUTOFF), tl.exp(z - tl.load(record + LOG_MASS)), 0.0)

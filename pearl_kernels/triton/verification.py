"""``verify`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.verification``.

All rows become distributions at once (under "coupled", draws). Then one small program for each request finds its first
row that fails, and the row that takes the token's place is drawn: the draft's distribution is computed for that row
alone, and max(p - q, 0) exists in registers only. Target rows are read once, or again where they are cut or chosen, a
chosen draft row twice. Launches: coupled 5, rejection 8, or 5 where every draft is a point mass. The block rule is in
``block_verification``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels.operands import check_verify
from pearl_kernels.reference import Rule, SamplingTensors, Stream, Verdict
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.block_verification import DECIDE, judge_blocks
from pearl_kernels.triton.block_verification import variants as block_variants
from pearl_kernels.triton.drafted import ratios
from pearl_kernels.triton.launch import distributions, make_plan, variant
from pearl_kernels.triton.philox import uniform
from pearl_kernels.triton.replacement import OpenRows, race_kernel, replace_failed
from pearl_kernels.triton.sampling import draw
from pearl_kernels.triton.statistics import GREEDY, KIND, NO_TOKEN, ints_of, scan_kernel
from pearl_kernels.triton.variants import Variant

_ACCEPT = tl.constexpr(int(Stream.ACCEPT))
_ROWS = tl.constexpr(32)  # of a request that are judged at a time, one for each lane of a warp
_DECIDE_WARPS = 1


@triton.jit(do_not_specialize=["draft_count"])
def decide_kernel(
    logits,  # [N, stride]
    draft_tokens,  # int64 [N]
    row_start,  # int32 [R + 1]
    positions,  # int64 [N]
    seed,  # int64 [R]
    draft_logprobs,  # fp32 [N] or None: log q is 0
    draft_rows,  # int32 [N] or None: -1
    floats,  # records of the N rows
    ints,
    drawn,  # int64 [N]: the target's own token, of each row if COUPLED, else of greedy rows
    accepted,  # int32 [R]
    next_token,  # int64 [R]
    failed,  # int32 [R]: row whose token remains to be drawn, -1: none
    failed_draft,  # int32 [R]: row of draft_logits that this takes, -1: none
    finished,  # int32 [R]: programs of the race that have finished
    stride,
    vocab_size,
    draft_count,  # rows of draft_logits
    SPAN: tl.constexpr,
    COUPLED: tl.constexpr,
):
    """Program r: test the rows of request r, all at once, and find the first that fails."""
    request = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(row_start + request), tl.load(row_start + request + 1)
    fails = NO_TOKEN
    for first in range(begin, end, _ROWS):
        index = first + tl.arange(0, _ROWS)
        inside, row = index < end, index.to(tl.int64)
        drafted = tl.load(draft_tokens + row, inside, -1)
        own = COUPLED | (tl.load(ints_of(ints, row, SPAN) + KIND, inside, GREEDY) == GREEDY)
        holds = own & (tl.load(drawn + row, inside, -1) == drafted)
        if not COUPLED:
            tested = inside & (own == 0) & (drafted >= 0) & (drafted < vocab_size)
            u = uniform(tl.load(seed + request), tl.load(positions + row, inside, 0), _ACCEPT)
            holds = holds | (u < ratios(logits, draft_logprobs, row, drafted, tested, floats, stride, SPAN))
        fails = tl.minimum(fails, tl.min(tl.where(inside & (holds == 0), index, NO_TOKEN)))
    tl.store(accepted + request, tl.minimum(fails, end) - begin)
    token, open_row, draft_row = -1, -1, -1
    if fails < end:
        if COUPLED | (tl.load(ints_of(ints, fails.to(tl.int64), SPAN) + KIND) == GREEDY):
            token = tl.load(drawn + fails).to(tl.int32)
        else:
            open_row = fails
            if draft_rows is not None:
                draft_row = tl.where(tl.load(draft_tokens + fails) >= 0, tl.load(draft_rows + fails), -1)
    tl.store(next_token + request, token)
    tl.store(failed + request, open_row)
    tl.store(failed_draft + request, tl.where(draft_row < draft_count, draft_row, -1))
    tl.store(finished + request, 0)


def verify(
    logits: Tensor,
    draft_tokens: Tensor,
    row_start: Tensor,
    positions: Tensor,
    params: SamplingTensors,
    vocab_size: int,
    rule: Rule = "rejection",
    draft_logprobs: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_rows: Tensor | None = None,
    draft_temperature: Tensor | None = None,
) -> Verdict:
    """The values of index tensors are not checked: that would wait for the device.

    What is not given of the draft makes it certain of its tokens: log q is 0, and q the point mass.
    """
    n, drafted = logits.shape[0], (draft_logprobs, draft_logits, draft_rows, draft_temperature)
    requests = check_verify(CHECKS, logits, draft_tokens, row_start, positions, params, vocab_size, rule, *drafted)
    if draft_logits is not None and draft_temperature is None:
        raise ValueError("verify: draft_logits needs draft_temperature")
    if n == 0 or requests == 0:
        none = logits.new_full((requests,), -1, dtype=torch.int64)
        return Verdict(logits.new_zeros(requests, dtype=torch.int32), none)

    plan = make_plan(n, vocab_size)
    if rule == "block":
        return judge_blocks(plan, logits, draft_tokens, row_start, positions, params, *drafted)
    coupled = rule == "coupled"
    if coupled:
        target = draw(plan, logits, params, positions, row_start)
        draft_logits = None
    else:
        target = distributions(plan, logits, params, row_start=row_start)
    open_rows = OpenRows.of(logits, requests)
    verdict = Verdict(logits.new_empty(requests, dtype=torch.int32), logits.new_empty(requests, dtype=torch.int64))
    decide_kernel[(requests,)](
        *(logits, draft_tokens, row_start, positions, params.seed, draft_logprobs, draft_rows),
        *(target.floats, target.ints, target.tokens, *verdict, *open_rows, logits.stride(0), vocab_size),
        0 if draft_logits is None else draft_logits.shape[0],
        SPAN=plan.span,
        COUPLED=coupled,
        num_warps=_DECIDE_WARPS,
    )
    if not coupled:
        last, q_logits, q = make_plan(requests, vocab_size), logits, target
        if draft_logits is not None and draft_temperature is not None:
            drafter = replace(params, temperature=draft_temperature)
            q_logits, q = draft_logits, distributions(last, draft_logits, drafter, rows=open_rows.failed_draft)
        inputs = logits, q_logits, draft_tokens, positions, params.seed
        replace_failed(last, *inputs, target, q, open_rows, verdict.next_token)
    return verdict


def _variants(dtype: str) -> tuple[Variant, ...]:
    scan = {"positions": None}
    decide: dict[str, object] = {"COUPLED": False}
    return (
        variant(f"verify-scan-{dtype}", scan_kernel, dtype, {"rows": None, **scan}),
        variant(f"verify-scan_draft-{dtype}", scan_kernel, dtype, {"row_start": None, **scan}),
        variant(f"verify-decide-{dtype}", decide_kernel, dtype, decide, num_warps=_DECIDE_WARPS),
        variant(f"verify-race-{dtype}", race_kernel, dtype, {"weights": None}),
        *block_variants(dtype),
    )


def _coupled_variants(dtype: str) -> tuple[Variant, ...]:
    decide = {"COUPLED": True, "draft_logprobs": None, "draft_rows": None}
    return (
        variant(f"verify-scan_coupled-{dtype}", scan_kernel, dtype, {"rows": None}),
        variant(f"verify-decide_coupled-{dtype}", decide_kernel, dtype, decide, num_warps=_DECIDE_WARPS),
    )


VARIANTS = (
    *(made for dtype in ("bf16", "fp16", "fp32") for made in _variants(dtype)),
    *_coupled_variants("bf16"),
    DECIDE,
)

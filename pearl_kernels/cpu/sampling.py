"""``sample`` and ``verify`` in C++, for fp32 and bf16 logits; meaning as in ``pearl_kernels.reference``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from pearl_kernels.cpu import _core
from pearl_kernels.cpu.checks import CHECKS
from pearl_kernels.native import RULE_CODES, NativeSampling
from pearl_kernels.operands import check_logits, check_sampling, new_alternatives
from pearl_kernels.reference import Rule, Sampled, SamplingTensors, Stream

_NATIVE = NativeSampling(_core, CHECKS, rules=get_args(Rule))

verify = _NATIVE.verify


def verify_numbers(
    logits: Tensor,
    draft_tokens: Sequence[int],
    row_start: Sequence[int],
    positions: Sequence[int],
    params: SamplingTensors,
    vocab_size: int,
    rule: Rule = "rejection",
    draft_logprobs: Sequence[float] = (),
    draft_logits: Tensor | None = None,
    draft_rows: Sequence[int] = (),
    draft_temperature: Sequence[float] = (),
) -> tuple[list[int], list[int]]:
    """``verify`` for index arrays in Python numbers; returns accepted counts and next tokens as such.

    The same kernel: what costs time on a CPU is ten tensors for a call of microseconds.
    """
    checks = CHECKS.beside("verify", "logits", logits)
    check_logits(checks, "verify", "logits", logits, vocab_size)
    check_sampling(checks, "verify", params, len(row_start) - 1)
    if draft_logits is not None:
        check_logits(checks, "verify", "draft_logits", draft_logits, vocab_size)
    return _core.verify_numbers(
        _NATIVE.logits(logits),
        _NATIVE.sampling(params),
        draft_tokens,
        row_start,
        positions,
        vocab_size,
        RULE_CODES[rule],
        draft_logprobs,
        _NATIVE.no_logits() if draft_logits is None else _NATIVE.logits(draft_logits),
        draft_rows,
        draft_temperature,
    )


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
    tokens = logits.new_empty(n, dtype=torch.int64)
    logprobs = logits.new_empty(n, dtype=torch.float32)
    ranked = new_alternatives(op, logits, alternatives)
    _core.sample(
        _NATIVE.logits(logits),
        _NATIVE.sampling(params),
        positions.data_ptr(),
        vocab_size,
        stream,
        tokens.data_ptr(),
        logprobs.data_ptr(),
        alternatives,
        *([t.data_ptr() for t in ranked] if ranked else (0, 0, 0)),
    )
    return Sampled(tokens, logprobs, ranked)

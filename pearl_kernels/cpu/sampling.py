"""``sample`` and ``verify`` in C++, for fp32 and bf16 logits; meaning as in ``pearl_kernels.reference.sampling``."""

from __future__ import annotations

import torch
from torch import Tensor

from pearl_kernels.cpu import CHECKS, _core
from pearl_kernels.native import NativeSampling
from pearl_kernels.operands import check_logits, check_sampling
from pearl_kernels.reference import Sampled, SamplingTensors, Stream

_NATIVE = NativeSampling(_core, CHECKS)

verify = _NATIVE.verify


def sample(
    logits: Tensor, params: SamplingTensors, positions: Tensor, vocab_size: int, stream: Stream = Stream.SAMPLE
) -> Sampled:
    op, n = "sample", logits.shape[0]
    check_logits(CHECKS, op, "logits", logits, vocab_size)
    check_sampling(CHECKS, op, params, n)
    CHECKS.contiguous(op, "positions", positions, torch.int64, (n,))
    tokens = logits.new_empty(n, dtype=torch.int64)
    logprobs = logits.new_empty(n, dtype=torch.float32)
    _core.sample(
        _NATIVE.logits(logits),
        _NATIVE.sampling(params),
        positions.data_ptr(),
        vocab_size,
        stream,
        tokens.data_ptr(),
        logprobs.data_ptr(),
    )
    return Sampled(tokens, logprobs)

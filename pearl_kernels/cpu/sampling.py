"""``sample`` and ``verify`` in C++; meaning, shapes and dtypes as in ``pearl_kernels.reference.sampling``.

Logits are fp32 or bf16; the draft's may differ from the target's. Inputs that a kernel cannot take raise ValueError.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pearl_kernels.checks import Checks
from pearl_kernels.cpu import _core
from pearl_kernels.reference import Rule, Sampled, SamplingTensors, Stream, Verdict

_checks = Checks("cpu", (torch.float32, torch.bfloat16))
_NO_LOGITS = _core.Logits(0, 0, 0, 0)


def sample(
    logits: Tensor, params: SamplingTensors, positions: Tensor, vocab_size: int, stream: Stream = Stream.SAMPLE
) -> Sampled:
    n = logits.shape[0]
    view = _logits("sample", "logits", logits, vocab_size)
    tokens = logits.new_empty(n, dtype=torch.int64)
    logprobs = logits.new_empty(n, dtype=torch.float32)
    _core.sample(
        view,
        _sampling("sample", params, n),
        _checks.contiguous("sample", "positions", positions, torch.int64, (n,)),
        vocab_size,
        stream,
        tokens.data_ptr(),
        logprobs.data_ptr(),
    )
    return Sampled(tokens, logprobs)


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
    op, n, requests = "verify", logits.shape[0], row_start.shape[0] - 1
    if rule not in ("rejection", "coupled"):
        raise ValueError(f"verify: rule must be 'rejection' or 'coupled', not {rule!r}")
    if requests < 0:
        raise ValueError("verify: row_start needs at least one entry")
    accepted = logits.new_empty(requests, dtype=torch.int32)
    next_token = logits.new_empty(requests, dtype=torch.int64)
    _core.verify(
        _logits(op, "logits", logits, vocab_size),
        _sampling(op, params, requests),
        _checks.contiguous(op, "draft_tokens", draft_tokens, torch.int64, (n,)),
        _checks.contiguous(op, "row_start", row_start, torch.int32, (requests + 1,)),
        _checks.contiguous(op, "positions", positions, torch.int64, (n,)),
        requests,
        vocab_size,
        rule == "coupled",
        _optional(op, "draft_logprobs", draft_logprobs, torch.float32, n),
        _NO_LOGITS if draft_logits is None else _logits(op, "draft_logits", draft_logits, vocab_size),
        _optional(op, "draft_rows", draft_rows, torch.int32, n),
        _optional(op, "draft_temperature", draft_temperature, torch.float32, requests),
        accepted.data_ptr(),
        next_token.data_ptr(),
    )
    return Verdict(accepted, next_token)


def _logits(op: str, name: str, logits: Tensor, vocab_size: int) -> _core.Logits:
    if logits.dim() != 2 or not 0 < vocab_size <= logits.shape[1]:
        raise ValueError(f"{op}: {name} must be [rows, at least {vocab_size}], not {list(logits.shape)}")
    n, width = logits.shape
    code = _checks.floating(op, name, logits)
    address, stride = _checks.rows(op, name, logits, logits.dtype, (n, width))
    return _core.Logits(address, code, n, stride)


def _sampling(op: str, params: SamplingTensors, n: int) -> _core.Sampling:
    return _core.Sampling(
        _checks.contiguous(op, "temperature", params.temperature, torch.float32, (n,)),
        _checks.contiguous(op, "top_k", params.top_k, torch.int32, (n,)),
        _checks.contiguous(op, "top_p", params.top_p, torch.float32, (n,)),
        _checks.contiguous(op, "min_p", params.min_p, torch.float32, (n,)),
        _checks.contiguous(op, "seed", params.seed, torch.int64, (n,)),
    )


def _optional(op: str, name: str, tensor: Tensor | None, dtype: torch.dtype, n: int) -> int:
    return 0 if tensor is None else _checks.contiguous(op, name, tensor, dtype, (n,))

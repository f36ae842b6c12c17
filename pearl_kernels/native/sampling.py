"""``verify`` and what it shares with ``sample``; meaning, shapes and dtypes as in ``pearl_kernels.reference.sampling``.

Logits are of the dtypes of the module's checks; the draft's may differ from the target's. Inputs that a kernel cannot
take raise ValueError.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pearl_kernels.native.module import NativeModule
from pearl_kernels.reference import Rule, SamplingTensors, Verdict


class NativeSampling(NativeModule):
    def verify(
        self,
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
        checks, op, n, requests = self.checks, "verify", logits.shape[0], row_start.shape[0] - 1
        if rule not in ("rejection", "coupled"):
            raise ValueError(f"verify: rule must be 'rejection' or 'coupled', not {rule!r}")
        if requests < 0:
            raise ValueError("verify: row_start needs at least one entry")
        accepted = logits.new_empty(requests, dtype=torch.int32)
        next_token = logits.new_empty(requests, dtype=torch.int64)
        arguments = (
            self.logits(op, "logits", logits, vocab_size),
            self.sampling(op, params, requests),
            checks.contiguous(op, "draft_tokens", draft_tokens, torch.int64, (n,)),
            checks.contiguous(op, "row_start", row_start, torch.int32, (requests + 1,)),
            checks.contiguous(op, "positions", positions, torch.int64, (n,)),
            requests,
            vocab_size,
            rule == "coupled",
            self._optional(op, "draft_logprobs", draft_logprobs, torch.float32, n),
            self._no_logits() if draft_logits is None else self.logits(op, "draft_logits", draft_logits, vocab_size),
            self._optional(op, "draft_rows", draft_rows, torch.int32, n),
            self._optional(op, "draft_temperature", draft_temperature, torch.float32, requests),
            accepted.data_ptr(),
            next_token.data_ptr(),
        )
        self.run(op, logits, arguments)
        return Verdict(accepted, next_token)

    def logits(self, op: str, name: str, logits: Tensor, vocab_size: int) -> Any:
        """The module's view of rows of logits."""
        if logits.dim() != 2 or not 0 < vocab_size <= logits.shape[1]:
            raise ValueError(f"{op}: {name} must be [rows, at least {vocab_size}], not {list(logits.shape)}")
        n, width = logits.shape
        code = self.checks.floating(op, name, logits)
        address, stride = self.checks.rows(op, name, logits, logits.dtype, (n, width))
        return self.module.Logits(address, code, n, stride)

    def sampling(self, op: str, params: SamplingTensors, n: int) -> Any:
        """The module's view of n rows of sampling parameters."""
        checks = self.checks
        return self.module.Sampling(
            checks.contiguous(op, "temperature", params.temperature, torch.float32, (n,)),
            checks.contiguous(op, "top_k", params.top_k, torch.int32, (n,)),
            checks.contiguous(op, "top_p", params.top_p, torch.float32, (n,)),
            checks.contiguous(op, "min_p", params.min_p, torch.float32, (n,)),
            checks.contiguous(op, "seed", params.seed, torch.int64, (n,)),
        )

    def _no_logits(self) -> Any:
        return self.module.Logits(0, 0, 0, 0)

    def _optional(self, op: str, name: str, tensor: Tensor | None, dtype: torch.dtype, n: int) -> int:
        return 0 if tensor is None else self.checks.contiguous(op, name, tensor, dtype, (n,))

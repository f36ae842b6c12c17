"""``verify`` and what it shares with ``sample``; meaning, shapes and dtypes as in ``pearl_kernels.reference``.

Logits are of the dtypes of the module's checks; the draft's may differ from the target's. Inputs that a kernel cannot
take raise ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pearl_kernels.checks import DTYPE_CODES
from pearl_kernels.native.module import NativeModule
from pearl_kernels.operands import check_verify
from pearl_kernels.reference import Rule, SamplingTensors, Verdict

RULE_CODES: Mapping[Rule, int] = {"rejection": 0, "coupled": 1, "block": 2}  # csrc/include/pearl/params.h


@dataclass(frozen=True)
class NativeSampling(NativeModule):
    """``rules``: of verification, which the module's kernel has."""

    rules: tuple[Rule, ...] = ("rejection", "coupled")

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
        drafted = (draft_logprobs, draft_logits, draft_rows, draft_temperature)
        requests = check_verify(
            self.checks, logits, draft_tokens, row_start, positions, params, vocab_size, rule, *drafted
        )
        if rule not in self.rules:
            raise ValueError(f"verify: the {self.checks.device} kernel has the rules {self.rules}, not {rule!r}")
        accepted = logits.new_empty(requests, dtype=torch.int32)
        next_token = logits.new_empty(requests, dtype=torch.int64)
        arguments = (
            self.logits(logits),
            self.sampling(params),
            draft_tokens.data_ptr(),
            row_start.data_ptr(),
            positions.data_ptr(),
            requests,
            vocab_size,
            RULE_CODES[rule],
            _address(draft_logprobs),
            self.no_logits() if draft_logits is None else self.logits(draft_logits),
            _address(draft_rows),
            _address(draft_temperature),
            accepted.data_ptr(),
            next_token.data_ptr(),
        )
        self.run("verify", logits, arguments)
        return Verdict(accepted, next_token)

    def logits(self, logits: Tensor) -> Any:
        """The module's view of rows of logits, which were checked."""
        return self.module.Logits(logits.data_ptr(), DTYPE_CODES[logits.dtype], logits.shape[0], logits.stride(0))

    def no_logits(self) -> Any:
        return self.module.Logits(0, 0, 0, 0)

    def sampling(self, params: SamplingTensors) -> Any:
        """The module's view of sampling parameters, which were checked."""
        return self.module.Sampling(*params.addresses)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()

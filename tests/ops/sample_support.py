"""What ``sample``'s draws are compared with."""

from __future__ import annotations

from typing import Any

import torch
from ops_support import Implementation, decided
from torch import Tensor

from pearl_kernels import SamplingTensors, reference


def check(sample: Implementation, logits: Tensor, params: SamplingTensors, vocab_size: int, **kwargs: Any) -> None:
    positions = torch.randint(0, 2**31, (len(logits),))
    tokens, logprobs = sample(logits, params, positions, vocab_size, **kwargs)
    expected = reference.sample(logits, params, positions, vocab_size, **kwargs)
    assert (tokens.dtype, logprobs.dtype) == (torch.int64, torch.float32)
    same = decided(logits, params, positions, vocab_size, **kwargs) if vocab_size > 1 else torch.tensor(True)
    assert torch.equal(tokens[same], expected.tokens[same])
    torch.testing.assert_close(logprobs[same], expected.logprobs[same], rtol=1e-5, atol=1e-5)

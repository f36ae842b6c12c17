"""Parameters for ``sample``, and what its draws are compared with."""

from __future__ import annotations

from typing import Any

import torch
from ops_support import Implementation, decided, sampling
from torch import Tensor

from pearl_kernels import SamplingTensors, reference


def check(sample: Implementation, logits: Tensor, params: SamplingTensors, vocab_size: int, **kwargs: Any) -> None:
    positions = torch.randint(0, 2**31, (len(logits),))
    tokens, logprobs, _ = sample(logits, params, positions, vocab_size, **kwargs)
    expected = reference.sample(logits, params, positions, vocab_size, **kwargs)
    assert (tokens.dtype, logprobs.dtype) == (torch.int64, torch.float32)
    same = decided(logits, params, positions, vocab_size, **kwargs) if vocab_size > 1 else torch.tensor(True)
    assert torch.equal(tokens[same], expected.tokens[same])
    torch.testing.assert_close(logprobs[same], expected.logprobs[same], rtol=1e-5, atol=1e-5)


def one_row_for_each(cuts: list[dict[str, Any]]) -> SamplingTensors:
    """A row with each of these parameters, every one with its own seed."""
    rows = [sampling(1, **{"seed": 100 + i, **cut}) for i, cut in enumerate(cuts)]
    return SamplingTensors(*(torch.cat([getattr(r, f) for r in rows]) for f in rows[0].__dataclass_fields__))

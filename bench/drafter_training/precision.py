"""In which numbers products are computed here."""

from __future__ import annotations

import torch


def fast_dtype(device: str) -> torch.dtype:
    """bf16 where the machine multiplies it; a CPU without such instructions takes longer than with fp32."""
    narrow = device != "cpu" or bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    return torch.bfloat16 if narrow else torch.float32

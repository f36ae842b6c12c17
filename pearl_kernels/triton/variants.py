"""What a kernel module says about the specialisations that it launches, so that they can be compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ALIGNED = 16  # bytes; Triton specialises on pointers and sizes that are multiples of it


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel, as production launches it.

    ``signature``: Triton type of every argument in order ("*bf16", "i32", "fp32", "constexpr"). ``aligned``: arguments
    that are multiples of 16 (pointers of torch tensors, even strides). ``spills``: why registers may be spilled, if
    they may.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 3
    aligned: tuple[str, ...] = ()
    spills: str | None = None

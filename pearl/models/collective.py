"""What the ranks of a tensor-parallel forward exchange."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Group(Protocol):
    """What is used of torch.distributed's process groups (ProcessGroupGloo, ProcessGroupNCCL)."""

    def name(self) -> str: ...

    def size(self) -> int: ...

    def abort(self) -> None: ...

    def allreduce(self, tensors: list[Tensor]) -> Any: ...

    def allgather(self, output_tensors: list[list[Tensor]], input_tensors: list[Tensor]) -> Any: ...


class Collective:
    """One rank's side of the exchange. ``group`` belongs to one model: no default process group is touched."""

    def __init__(self, group: Group, vocab_size: int) -> None:
        self._group, self._vocab_size = group, vocab_size

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place."""
        self._group.allreduce([x]).wait()
        return x

    def gather_logits(self, part: Tensor) -> Tensor:
        """Every rank's ``[M, V / ranks]`` side by side, without the padding: ``[M, V]``."""
        parts = [torch.empty_like(part) for _ in range(self._group.size())]
        self._group.allgather([parts], [part.contiguous()]).wait()
        return torch.cat(parts, dim=-1)[:, : self._vocab_size]

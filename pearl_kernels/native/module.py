"""A compiled module of csrc/python, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pearl_kernels.checks import Checks


def workspace(like: Tensor, size: int) -> Tensor:
    """Uninitialised memory on a tensor's device, for work on the device's current stream."""
    return like.new_empty(size, dtype=torch.uint8)


@dataclass(frozen=True)
class NativeModule:
    """``module`` takes addresses and sizes of tensors that have passed ``checks``.

    ``where``: device number and stream for work on this tensor, the last argument of every operator; None on the CPU.
    ``scratch``: makes the workspace, of so many bytes, of operators that need one; None where none does.
    ``counters``: int32 zeros on a tensor's device, which a call on its current stream uses and leaves zero; they stay
    there as long as anything captured lives. None, or a result of None: each call makes its own in its workspace.
    """

    module: ModuleType
    checks: Checks
    where: Callable[[Tensor], tuple[int, int]] | None = None
    scratch: Callable[[Tensor, int], Tensor] | None = None
    counters: Callable[[Tensor], Tensor | None] | None = None

    def run(self, op: str, like: Tensor, arguments: tuple[Any, ...]) -> None:
        """Calls an operator that may need a workspace, after it has said how large."""
        function, where = getattr(self.module, op), self.where and self.where(like)
        if self.scratch is None:
            function(*arguments, where)
            return
        size = getattr(self.module, f"{op}_workspace")(*arguments, where)
        held = self.scratch(like, size)  # until the launch; afterwards the stream's order protects it
        function(*arguments, held.data_ptr(), size, where)

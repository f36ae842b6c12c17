"""A head with its KV cache and its queue: what a drafter around it works with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pearl.heads.fused_eagle import FusedEagle, can_fuse_head
from pearl.heads.loader import Head
from pearl.host_tensors import from_numbers
from pearl.kv import PageCopy
from pearl.models import KVCache
from pearl.workers import DeviceQueue
from pearl.workers.stopwatch import Stopwatch
from pearl_kernels import KernelSet


@dataclass(frozen=True)
class HeadRunner:
    """Belongs to one worker. Engines may share it, if only one of them works at a time."""

    model: Head
    cache: KVCache
    page_size: int
    queue: DeviceQueue
    threads: int = 1  # of a fused window, the calling one included,
    beside: int | None = None  # and while the target works too; None: as many
    stopwatch: Stopwatch = field(init=False)
    fused: FusedEagle | None = field(init=False)  # where a window is one call, with threads of its own

    def __post_init__(self) -> None:
        object.__setattr__(self, "stopwatch", Stopwatch(self.queue))
        fused = FusedEagle(self.model, self.cache, self.threads, self.beside) if can_fuse_head(self.model) else None
        object.__setattr__(self, "fused", fused)

    @property
    def kernels(self) -> KernelSet:
        return self.model.kernels

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        if copies:
            pairs = [(copy.source, copy.destination) for copy in copies]
            self.cache.copy_pages(from_numbers(pairs, torch.int64, self.queue.device), self.kernels)

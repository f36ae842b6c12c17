"""What a provider must offer, and the situation that it is asked about: for the registry and for providers alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pearl_kernels.reference import Rule, WeightFormat


@dataclass(frozen=True)
class Situation:
    """What a provider may make its support depend on."""

    device: str = "cpu"  # torch device type
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    threads: int = 1  # intra-op threads of the worker
    page_size: int = 16  # tokens of a KV page
    weights: WeightFormat = "full"  # what pack_linear makes of a matrix
    rule: Rule = "rejection"  # that verify is called with
    sinks: bool = False  # verify_attention is called with some


@dataclass(frozen=True)
class Provider:
    """``operators`` by name; ``refuses(op, situation)`` is None, or the reason why the provider cannot run there.

    ``missing()`` is None, or what is wrong with the package behind it. It may import that, which takes seconds and
    starts CUDA: only a provider that is about to be chosen is asked. ``refuses`` imports nothing that others own.

    ``bind(op, situation)`` is the operator for one worker where the situation decides more than whether it runs.
    """

    name: str
    operators: Mapping[str, Callable[..., Any]]
    refuses: Callable[[str, Situation], str | None]
    bind: Callable[[str, Situation], Callable[..., Any]] | None = None
    verify_numbers: Callable[..., Any] | None = None
    missing: Callable[[], str | None] = lambda: None

    def for_worker(self, op: str, situation: Situation) -> Callable[..., Any]:
        return self.bind(op, situation) if self.bind else self.operators[op]

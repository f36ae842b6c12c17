"""What the engine runs, whichever backend computes it: our decoder, or transformers' own module."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pearl.models.forward_batch import ForwardBatch
from pearl.models.hidden_states import HiddenStates
from pearl.models.kv_cache import KVCache
from pearl.models.model_shape import ModelShape
from pearl_kernels import KernelSet


class CausalModel(Protocol):
    """Weights and operators, stateless between forwards. Called in torch.inference_mode, by one thread at a time."""

    @property
    def config(self) -> ModelShape: ...
    @property
    def kernels(self) -> KernelSet: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def forward(self, batch: ForwardBatch, cache: KVCache, hidden: HiddenStates | None = None) -> Tensor:
        """Compute all N tokens, write their keys and values, fill ``hidden``, and return logits ``[M, V]`` of
        batch.logits_rows.
        """
        ...

    def new_hidden(self, rows: int, layers: tuple[int, ...]) -> HiddenStates:
        """Uninitialised, for a forward of so many tokens."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """``[N, D]`` for int64 ids ``[N]``."""
        ...

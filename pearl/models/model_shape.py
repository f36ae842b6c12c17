"""What the engine knows of a model before a weight is read, whichever backend computes it."""

from __future__ import annotations

from typing import Protocol

import torch


class ModelShape(Protocol):
    """Known before a weight is read: sizes of logits and KV pages, and how long a text may be.

    ``vocab_size`` may include padding. ``dtype``: that it computes in. ``sinks``: whether attention has some.
    """

    @property
    def architecture(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def sinks(self) -> bool: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def require_length(self, max_model_len: int) -> None:
        """ConfigurationError if the model cannot be run exactly on that many positions."""
        ...

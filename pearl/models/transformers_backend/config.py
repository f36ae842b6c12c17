"""What the engine knows of a model that transformers' own module computes, before a weight is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pearl.errors import ConfigurationError


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer as its module was seen to call attention. ``module``: its name within the model.

    ``window``: keys that a row sees, its own included, 0 for all; ``heads`` may share ``kv_heads``.
    """

    module: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int


@dataclass(frozen=True)
class TransformersConfig:
    """A model's shape (``ModelShape``). ``attention``: in the order of their calls; all have the same heads.

    ``known_ids``: ids that its weights have rows for; ``vocab_size`` may be more (``widening``).
    ``max_position_embeddings``: as many positions as give each token the same result in whatever batch it is.
    ``parameters``: numbers in its weights, those that two layers share once. ``hidden``: the width of its hidden
    states; 0: it does not hand over one for each layer.
    """

    architecture: str
    vocab_size: int
    known_ids: int
    attention: tuple[AttentionLayer, ...]
    max_position_embeddings: int
    dtype: torch.dtype
    parameters: int
    sinks: bool = False  # such attention is refused (``trace``)
    hidden: int = 0

    @property
    def longest(self) -> int:
        return self.max_position_embeddings

    @property
    def layers(self) -> int:
        return len(self.attention)

    @property
    def kv_heads(self) -> int:
        return self.attention[0].kv_heads

    @property
    def head_dim(self) -> int:
        return self.attention[0].head_dim

    def require_length(self, max_model_len: int) -> None:
        """ConfigurationError if the model cannot be run exactly on that many positions."""
        if max_model_len > self.max_position_embeddings:
            raise ConfigurationError(
                f"max_model_len={max_model_len} is more than the {self.max_position_embeddings} positions that "
                f"transformers' {self.architecture} computes alike in every batch; lower max_model_len to it"
            )

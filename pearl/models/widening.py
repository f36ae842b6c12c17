"""A model whose vocabulary is smaller than another's, made as wide.

A draft may have to read ids that it lacks: they read as the mean of its embeddings, which says the least. It never
drafts them: their logits are -inf, q is 0 there, and the residual that replaces a rejected token is exact. Nothing
beyond the weights needs to know.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pearl.models.sharding import Sharding


def widen(sharding: Sharding, vocab_size: int) -> Sharding:
    """Of a whole model: with room for ``vocab_size`` ids, if it has fewer."""
    if vocab_size <= sharding.config.vocab_size:
        return sharding
    return replace(
        sharding,
        config=replace(sharding.config, vocab_size=vocab_size),
        vocab=replace(sharding.vocab, size=vocab_size),
    )


def widen_embedding(embedding: Tensor, vocab_size: int) -> Tensor:
    """``[V, D]`` to ``[vocab_size, D]``; as it is if it has that many rows."""
    missing = vocab_size - embedding.shape[0]
    if missing <= 0:
        return embedding
    mean = embedding.mean(0, dtype=torch.float32).to(embedding.dtype)
    return torch.cat([embedding, mean.expand(missing, -1)])


def bias_of_missing(known: int, vocab_size: int, like: Tensor) -> Tensor | None:
    """What a widened head adds to its logits, ``[vocab_size]``; None if no id is missing."""
    if vocab_size <= known:
        return None
    bias = like.new_zeros(vocab_size)
    bias[known:] = -torch.inf
    return bias

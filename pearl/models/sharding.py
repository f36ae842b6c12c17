"""Which part of a model each rank of a tensor-parallel group holds.

Column-parallel: q, k, v, gate and up are cut along their outputs, by heads and by feed-forward columns. Row-parallel:
the attention's and the feed-forward's output projections are cut along their inputs, and the ranks' results are added
up. The head is cut along the vocabulary. Embedding and norms are whole on every rank (Shoeybi et al. 2019).

What does not divide is padded with zeros, which contribute nothing: a zero query meets zero columns of the output
projection, ``silu(0) * 0 = 0``, and logits past the vocabulary are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pearl.errors import ConfigurationError
from pearl.models.model_config import ModelConfig


@dataclass(frozen=True)
class Span:
    """A rank's part of a dimension: units [begin, end) of the whole, then zeros up to ``size``."""

    begin: int
    end: int
    size: int

    def times(self, width: int) -> Span:
        """The same part where every unit is ``width`` wide."""
        return Span(self.begin * width, self.end * width, self.size * width)

    def after(self, units: int) -> Span:
        """The same part where ``units`` of something else come first."""
        return Span(self.begin + units, self.end + units, self.size)


@dataclass(frozen=True)
class Sharding:
    """Rank ``rank`` of ``ranks``. ``config`` is its own decoder's shape; the spans say where its weights lie."""

    rank: int
    ranks: int
    config: ModelConfig
    heads: Span
    kv_heads: Span
    ffn: Span
    vocab: Span

    @property
    def is_first(self) -> bool:
        """Whether biases that are added once, after the ranks' results were added up, belong to this rank."""
        return self.rank == 0


def shard(config: ModelConfig, rank: int, ranks: int) -> Sharding:
    """The part of rank ``rank``. Raises ConfigurationError if the heads cannot be given out to that many ranks."""
    if ranks > 1 and config.qk_norm == "projection":
        raise ConfigurationError(
            f"a {config.architecture} norms its queries and its keys over all heads together, which lie on several "
            "ranks; leave target_parallel at 1"
        )
    if ranks > 1 and config.mixture is not None:
        raise ConfigurationError(
            f"a {config.architecture} is a mixture of experts, which is not given out to several ranks; leave "
            "target_parallel at 1"
        )
    kv_heads, heads = _heads(config, rank, ranks)
    ffn, vocab = _cut(config.ffn, rank, ranks), _cut(config.vocab_size, rank, ranks)
    local = replace(config, heads=heads.size, kv_heads=kv_heads.size, ffn=ffn.size, vocab_size=vocab.size)
    return Sharding(rank, ranks, local, heads, kv_heads, ffn, vocab)


def _cut(total: int, rank: int, ranks: int) -> Span:
    """Equal parts, the last ones padded."""
    size = -(-total // ranks)
    begin = min(rank * size, total)
    return Span(begin, min(begin + size, total), size)


def _heads(config: ModelConfig, rank: int, ranks: int) -> tuple[Span, Span]:
    """KV heads and query heads of a rank; every rank has as many query heads to a KV head as the others."""
    group = config.heads // config.kv_heads
    if config.kv_heads >= ranks:
        kv = _cut(config.kv_heads, rank, ranks)
        if (ranks - 1) * kv.size >= config.kv_heads:
            raise ConfigurationError(
                f"{config.kv_heads} KV heads cannot be given out to {ranks} ranks: the last would have none; "
                f"choose a target_parallel that divides {config.kv_heads}"
            )
        return kv, kv.times(group)
    if ranks % config.kv_heads:
        raise ConfigurationError(
            f"{config.kv_heads} KV heads cannot be shared evenly by {ranks} ranks; choose a target_parallel that is a "
            f"multiple or a divisor of {config.kv_heads}"
        )
    copies = ranks // config.kv_heads  # ranks that hold the same KV head, each with a part of its query heads
    if copies > group:
        raise ConfigurationError(
            f"{config.heads} query heads are too few for {ranks} ranks; choose a target_parallel up to {config.heads}"
        )
    head = rank // copies
    part = _cut(group, rank % copies, copies)
    first = head * group
    return Span(head, head + 1, 1), Span(first + part.begin, first + part.end, part.size)

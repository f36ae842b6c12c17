"""Which heads, feed-forward columns and tokens each rank holds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pearl.errors import ConfigurationError
from pearl.models import ModelConfig
from pearl.models.sharding import Sharding, Span, shard

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=131,
    hidden=48,
    layers=1,
    heads=8,
    kv_heads=4,
    head_dim=8,
    ffn=80,
    eps=1e-6,
    tied=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm="none",
    windows=(0,),
    max_position_embeddings=64,
    rope={"rope_type": "default", "rope_theta": 1e4},
)


def test_norms_over_all_heads_cannot_be_cut() -> None:
    config = replace(CONFIG, architecture="Olmo2ForCausalLM", qk_norm="projection")
    assert shard(config, 0, 1).config == config
    with pytest.raises(ConfigurationError, match=r"Olmo2ForCausalLM norms its queries .* leave target_parallel at 1"):
        shard(config, 0, 2)


def every(config: ModelConfig, ranks: int) -> list[Sharding]:
    return [shard(config, rank, ranks) for rank in range(ranks)]


def units(spans: list[Span]) -> list[int]:
    return [unit for span in spans for unit in range(span.begin, span.end)]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks"),
    [(8, 4, 1), (8, 4, 2), (8, 4, 4), (6, 2, 2), (9, 3, 2), (15, 5, 3), (6, 2, 4), (7, 1, 2), (7, 1, 3), (5, 1, 5)],
)
def test_every_head_has_one_rank_and_meets_its_own_kv_head(heads: int, kv_heads: int, ranks: int) -> None:
    config, group = replace(CONFIG, heads=heads, kv_heads=kv_heads), heads // kv_heads
    shards = every(config, ranks)
    assert units([s.heads for s in shards]) == list(range(heads))
    assert set(units([s.kv_heads for s in shards])) == set(range(kv_heads))
    for s in shards:
        assert (s.config.heads, s.config.kv_heads) == (s.heads.size, s.kv_heads.size)
        assert s.heads.size % s.kv_heads.size == 0
        for index, head in enumerate(range(s.heads.begin, s.heads.end)):
            local_kv = index // (s.heads.size // s.kv_heads.size)
            assert s.kv_heads.begin + local_kv == head // group
    assert len({(s.heads.size, s.kv_heads.size, s.ffn.size, s.vocab.size) for s in shards}) == 1


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_columns_and_tokens_are_cut_evenly_and_the_last_part_is_padded(ranks: int) -> None:
    shards = every(replace(CONFIG, heads=12, kv_heads=12, ffn=82), ranks)
    assert units([s.ffn for s in shards]) == list(range(82))
    assert units([s.vocab for s in shards]) == list(range(131))
    assert [s.ffn.size for s in shards] == [-(-82 // ranks)] * ranks
    assert [s.config.vocab_size for s in shards] == [-(-131 // ranks)] * ranks


def test_one_rank_is_the_whole_model() -> None:
    assert shard(CONFIG, 0, 1).config == CONFIG


def test_spans_scale_with_the_width_of_their_units() -> None:
    assert Span(2, 3, 4).times(8) == Span(16, 24, 32)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "message"),
    [
        (8, 4, 3, "4 KV heads cannot be given out to 3 ranks: the last would have none"),
        (6, 2, 3, "2 KV heads cannot be shared evenly by 3 ranks"),
        (4, 2, 8, "4 query heads are too few for 8 ranks"),
    ],
)
def test_what_cannot_be_given_out_is_refused(heads: int, kv_heads: int, ranks: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        shard(replace(CONFIG, heads=heads, kv_heads=kv_heads), ranks - 1, ranks)

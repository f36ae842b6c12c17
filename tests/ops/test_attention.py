"""verify_attention: ragged queries over a paged cache whose unused parts are poisoned."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_support import (
    Implementation,
    assert_close_by_head,
    assert_rounds_to,
    both_dtypes,
    implementations,
    paged,
    some_sinks,
    strided_rows,
)
from torch import Tensor

from pearl_kernels import reference

attention = pytest.mark.parametrize("attention", implementations("verify_attention"))

# (queries, context) of each sequence: decoding, windows, a chunk, a whole prompt, a sequence without queries
MIXED = [(1, 1), (1, 40), (5, 67), (4, 4), (0, 9), (70, 131), (1, 256)]


def check(
    attention: Implementation,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    page_size: int = 16,
    window: int = 0,
    softcap: float = 0.0,
    q_dtype: torch.dtype | None = None,
    sinks: Tensor | None = None,
) -> None:
    queries, contexts = zip(*sequences, strict=True)
    cache = paged(queries, contexts, heads[1], head_dim, page_size, dtype)
    q = strided_rows((torch.randn(sum(queries), heads[0], head_dim) * 2).to(q_dtype or dtype))
    index = (cache.block_tables, cache.query_start, cache.context_lens, head_dim**-0.5, window, softcap, 0, sinks)
    out = attention(q, cache.k_cache, cache.v_cache, *index)
    assert out.dtype == q.dtype
    exact = reference.verify_attention(q.float(), cache.k_cache.float(), cache.v_cache.float(), *index)
    assert_rounds_to(out, exact, tolerance=2e-5)


@attention
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 128, 256])
@both_dtypes
def test_head_dims_match_reference(attention: Implementation, head_dim: int, dtype: torch.dtype) -> None:
    check(attention, MIXED, (4, 2), head_dim, dtype)


@attention
@pytest.mark.parametrize("group", range(1, 9))
@both_dtypes
def test_groups_match_reference(attention: Implementation, group: int, dtype: torch.dtype) -> None:
    check(attention, [(1, 33), (3, 20), (40, 64)], (2 * group, 2), 64, dtype)


@attention
@pytest.mark.parametrize("page_size", [1, 16, 32, 48])
@both_dtypes
def test_page_sizes_match_reference(attention: Implementation, page_size: int, dtype: torch.dtype) -> None:
    check(attention, MIXED, (2, 1), 64, dtype, page_size=page_size)


@attention
@pytest.mark.parametrize("window", [1, 5, 31, 64, 1000])
@both_dtypes
def test_windows_match_reference(attention: Implementation, window: int, dtype: torch.dtype) -> None:
    check(attention, MIXED, (2, 1), 64, dtype, window=window)


@attention
@pytest.mark.parametrize("softcap", [1.0, 30.0])
@both_dtypes
def test_softcap_matches_reference(attention: Implementation, softcap: float, dtype: torch.dtype) -> None:
    check(attention, MIXED, (2, 1), 64, dtype, softcap=softcap)
    check(attention, MIXED, (2, 1), 64, dtype, softcap=softcap, window=20)


@attention
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (20, 0.0), (5, 2.0)])
@both_dtypes
def test_sinks_match_reference(attention: Implementation, window: int, softcap: float, dtype: torch.dtype) -> None:
    for heads in ((7, 1), (8, 4)):
        check(attention, MIXED, heads, 24, dtype, window=window, softcap=softcap, sinks=some_sinks(heads[0]))


@attention
def test_what_a_large_sink_leaves_is_exact_and_what_none_leaves_unchanged(attention: Implementation) -> None:
    """Of a head whose sink has nearly all of the mass; and a row has the same bits in whatever window."""
    cache = paged([3, 1], [150, 70], 2, 32, 16, torch.float32)
    q, sinks = torch.randn(4, 4, 32), torch.tensor([60.0, -torch.inf, -200.0, 5.0])
    call = (q, cache.k_cache, cache.v_cache, cache.block_tables, cache.query_start, cache.context_lens, 0.3, 0, 0.0, 0)
    out, plain = attention(*call, sinks), attention(*call)
    assert_close_by_head(out, reference.verify_attention(*call, sinks))
    assert 0 < out[:, 0].abs().max() < 1e-15
    assert_close_by_head(out[:, 1:3], plain[:, 1:3])
    start, length = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([149], dtype=torch.int32)
    alone = attention(q[1:2], *call[1:3], cache.block_tables[:1], start, length, *call[6:], sinks)
    assert torch.equal(alone[0], out[1])


@attention
def test_sinks_that_do_not_fit_are_refused(attention: Implementation) -> None:
    cache = paged([1], [9], 2, 16, 16, torch.float32)
    call = (torch.randn(1, 4, 16), cache.k_cache, cache.v_cache, cache.block_tables, cache.query_start)
    if attention is not reference.verify_attention:
        for sinks in (torch.zeros(2), torch.zeros(4).double(), torch.zeros(8)[::2]):
            with pytest.raises(ValueError, match="verify_attention: sinks must be"):
                attention(*call, cache.context_lens, 0.2, 0, 0.0, 0, sinks)


@attention
def test_results_do_not_hang_on_the_hint_of_the_most_rows(attention: Implementation) -> None:
    queries, contexts = zip(*MIXED, strict=True)
    cache = paged(queries, contexts, 2, 64, 16, torch.float32)
    call = (torch.randn(sum(queries), 4, 64), cache.k_cache, cache.v_cache, cache.block_tables, cache.query_start)
    results = [attention(*call, cache.context_lens, 0.2, 0, 0.0, most_rows) for most_rows in (0, 1, 70, 300)]
    assert all(torch.equal(result, results[0]) for result in results)


@attention
def test_query_and_cache_dtypes_may_differ(attention: Implementation) -> None:
    check(attention, MIXED, (4, 2), 64, torch.bfloat16, q_dtype=torch.float32)
    check(attention, MIXED, (4, 2), 64, torch.float32, q_dtype=torch.bfloat16)


@attention
def test_nothing_to_do(attention: Implementation) -> None:
    check(attention, [(0, 0), (0, 17)], (4, 2), 64, torch.float32)


@attention
def test_large_scores_do_not_overflow(attention: Implementation) -> None:
    cache = paged([2], [50], 1, 64, 16, torch.float32)
    q = torch.randn(2, 1, 64) * 1e3
    args = (q, cache.k_cache, cache.v_cache, cache.block_tables, cache.query_start, cache.context_lens, 1.0)
    torch.testing.assert_close(attention(*args), reference.verify_attention(*args), rtol=1e-3, atol=1e-3)


@attention
def test_rows_do_not_depend_on_the_batch(attention: Implementation) -> None:
    """A window's rows are bit for bit what each would be, had it been decoded alone."""
    cache = paged([6], [45], 2, 64, 16, torch.bfloat16)
    q = torch.randn(6, 4, 64).bfloat16()
    together = attention(
        q, cache.k_cache, cache.v_cache, cache.block_tables, cache.query_start, cache.context_lens, 0.125
    )
    for i in range(6):
        start, length = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([40 + i], dtype=torch.int32)
        alone = attention(q[i : i + 1], cache.k_cache, cache.v_cache, cache.block_tables, start, length, 0.125)
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("attention", [p for p in implementations("verify_attention") if p.id == "cpu-cpu"])
@pytest.mark.parametrize("window", [0, 5, 33, 40])
@pytest.mark.parametrize("group", [1, 3, 5])
def test_a_row_sees_nothing_of_later_keys(attention: Implementation, window: int, group: int) -> None:
    """Its bits are what it gets alone, sliding windows included, and NaN in a later row's key or value stays there."""
    rows, length = 40, 130
    cache = paged([rows], [length], 2, 64, 16, torch.float32)
    q = torch.randn(rows, 2 * group, 64)
    last = cache.block_tables[0, (length - 1) // 16], (length - 1) % 16
    cache.k_cache[last], cache.v_cache[last] = torch.nan, torch.nan
    rest = (cache.k_cache, cache.v_cache, cache.block_tables)
    together = attention(q, *rest, cache.query_start, cache.context_lens, 0.125, window)
    assert together[-1].isnan().all()
    assert together[:-1].isfinite().all()
    for i in range(0, rows - 1, 3):
        start = torch.tensor([0, 1], dtype=torch.int32)
        context = torch.tensor([length - rows + i + 1], dtype=torch.int32)
        assert torch.equal(attention(q[i : i + 1], *rest, start, context, 0.125, window)[0], together[i])


@pytest.mark.parametrize("window", [0, 7])
def test_reference_is_masked_attention(window: int) -> None:
    sequences = [(1, 30), (6, 6), (4, 19)]
    queries, contexts = zip(*sequences, strict=True)
    cache = paged(queries, contexts, 2, 16, 8, torch.float32)
    q = torch.randn(sum(queries), 6, 16)
    out = reference.verify_attention(
        q, cache.k_cache, cache.v_cache, cache.block_tables, cache.query_start, cache.context_lens, 0.3, window
    )
    for r, (count, length) in enumerate(sequences):
        begin = cache.query_start[r]
        keys, values = (gather(c, cache.block_tables[r], length) for c in (cache.k_cache, cache.v_cache))
        position = torch.arange(length - count, length)[:, None]
        visible = torch.arange(length)[None] <= position
        if window:
            visible &= torch.arange(length)[None] > position - window
        rows = q[begin : begin + count].transpose(0, 1)
        plain = F.scaled_dot_product_attention(rows, keys, values, attn_mask=visible, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(out[begin : begin + count], plain.transpose(0, 1))


def test_a_sink_of_the_reference_is_a_key_without_a_value() -> None:
    cache = paged([4], [19], 2, 16, 8, torch.float32)
    q, sinks = torch.randn(4, 6, 16), some_sinks(6)
    index = (cache.block_tables, cache.query_start, cache.context_lens, 0.3, 7, 0.0, 0)
    out = reference.verify_attention(q, cache.k_cache, cache.v_cache, *index, sinks)
    keys, values = (F.pad(gather(c, cache.block_tables[0], 19), (0, 0, 0, 1)) for c in (cache.k_cache, cache.v_cache))
    position, key = torch.arange(15, 19)[:, None], torch.arange(19)[None]
    added = torch.zeros(6, 4, 20)
    added[..., :19].masked_fill_((key > position) | (key <= position - 7), -torch.inf)
    added[..., 19] = sinks[:, None]
    plain = F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=added, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, plain.transpose(0, 1))


def gather(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """``[heads, length, head_dim]``, slot by slot."""
    size = cache.shape[1]
    return torch.stack([cache[table[i // size], i % size] for i in range(length)], dim=1)

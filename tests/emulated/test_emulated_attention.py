"""verify_attention of the GPU providers, on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulated_attention import arguments, exactly, inputs, new_memory_is_nan
from ops_support import (
    ULPS,
    Implementation,
    assert_close_by_head,
    assert_rounds_to,
    emulated,
    some_sinks,
)
from torch import Tensor

from pearl_kernels import reference

# Rows of a block that no sequence has see no keys; numpy, which the interpreter computes with, warns.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
attention = pytest.mark.parametrize("attention", emulated("verify_attention"))
every_dtype = pytest.mark.parametrize("dtype", ULPS, ids=("fp32", "bf16", "fp16"))

# (queries, context) of each sequence: a whole prompt, a window, none, decoding, a chunk
MIXED = [(2, 2), (5, 67), (0, 9), (1, 1), (12, 40)]


def check(
    attention: Implementation,
    sequences: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    page_size: int = 16,
    scale: float = 0.25,
    window: int = 0,
    softcap: float = 0.0,
    q_dtype: torch.dtype | None = None,
    sinks: Tensor | None = None,
) -> None:
    q, cache = inputs(sequences, heads, head_dim, dtype, page_size)
    q = q.to(q_dtype or dtype)
    with new_memory_is_nan():
        out = attention(*arguments(q, cache), scale, window, softcap, 0, sinks)
    assert out.dtype == q.dtype
    assert out.is_contiguous()
    assert_rounds_to(out, exactly(q, cache, scale, window, softcap, 0, sinks), ULPS[q.dtype], tolerance=2e-5)


@attention
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 128])
@every_dtype
def test_head_dims_match_reference(attention: Implementation, head_dim: int, dtype: torch.dtype) -> None:
    check(attention, MIXED, (2, 1), head_dim, dtype, scale=head_dim**-0.5)


@attention
def test_the_widest_heads_match_reference(attention: Implementation) -> None:
    check(attention, [(3, 40), (1, 9)], (4, 2), 256, torch.bfloat16, scale=0.0625)


@attention
@pytest.mark.parametrize("group", range(1, 9))
def test_groups_match_reference(attention: Implementation, group: int) -> None:
    dtype = torch.bfloat16 if group % 2 else torch.float32
    check(attention, [(1, 33), (3, 20), (9, 30)], (2 * group, 2), 16, dtype)


@attention
@pytest.mark.parametrize("page_size", [1, 16, 32, 48])
@every_dtype
def test_page_sizes_match_reference(attention: Implementation, page_size: int, dtype: torch.dtype) -> None:
    check(attention, MIXED, (2, 1), 32, dtype, page_size=page_size)


@attention
@pytest.mark.parametrize("window", [1, 5, 31, 64, 1000])
def test_windows_match_reference(attention: Implementation, window: int) -> None:
    check(attention, [(5, 67), (1, 97), (9, 40), (1, 1)], (2, 1), 16, torch.bfloat16, window=window)


@attention
@pytest.mark.parametrize("softcap", [1.0, 30.0])
@every_dtype
def test_softcap_matches_reference(attention: Implementation, softcap: float, dtype: torch.dtype) -> None:
    check(attention, MIXED, (2, 1), 16, dtype, softcap=softcap)
    check(attention, [(5, 67)], (2, 1), 16, dtype, softcap=softcap, window=20)


@attention
@pytest.mark.parametrize(
    ("dtype", "window", "softcap"), [(torch.bfloat16, 0, 0.0), (torch.float16, 20, 2.0), (torch.float32, 9, 0.0)]
)
def test_sinks_match_reference(attention: Implementation, window: int, softcap: float, dtype: torch.dtype) -> None:
    """Of windows and, in two-byte types, of a prompt."""
    sequences = [(5, 67), (0, 9), (1, 1)] + ([(40, 50)] if dtype.itemsize == 2 else [])
    check(attention, sequences, (7, 1), 16, dtype, window=window, softcap=softcap, sinks=some_sinks(7))


@attention
@pytest.mark.parametrize("window", [0, 300])
def test_a_sink_joins_once_whatever_the_splits(attention: Implementation, window: int) -> None:
    """Contexts of one split of 256 keys, of several, and of more than are merged at once."""
    sinks = torch.tensor([3.0, 8.0, -1.0, 30.0])
    check(attention, [(1, 200), (2, 700), (1, 2200)], (4, 1), 16, torch.bfloat16, window=window, sinks=sinks)


@attention
def test_what_a_large_sink_leaves_is_exact(attention: Implementation) -> None:
    q, cache = inputs([(1, 300), (1, 30)], (4, 2), 16, torch.float32, 16)
    sinks = torch.tensor([60.0, -torch.inf, -200.0, 5.0])
    out = attention(*arguments(q, cache), 0.25, 0, 0.0, 0, sinks)
    assert_close_by_head(out, exactly(q, cache, 0.25, 0, 0.0, 0, sinks))
    assert_close_by_head(out[:, 1:3], attention(*arguments(q, cache), 0.25)[:, 1:3])
    with pytest.raises(ValueError, match="verify_attention: sinks must be"):
        attention(*arguments(q, cache), 0.25, 0, 0.0, 0, sinks[:2])


@attention
@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_any_scale_matches_reference(attention: Implementation, scale: float) -> None:
    check(attention, [(5, 67)], (2, 1), 16, torch.float32, scale=scale)


@attention
@pytest.mark.parametrize(
    ("q_dtype", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float16),
    ],
)
def test_query_and_cache_dtypes_may_differ(attention: Implementation, q_dtype: torch.dtype, dtype: torch.dtype) -> None:
    check(attention, [(5, 67), (1, 20), (0, 3)], (4, 2), 32, dtype, q_dtype=q_dtype)


@attention
def test_results_do_not_hang_on_the_hint_of_the_most_rows(attention: Implementation) -> None:
    q, cache = inputs(MIXED, (8, 2), 32, torch.bfloat16, 16)
    results = [attention(*arguments(q, cache), 0.2, 0, 0.0, most_rows) for most_rows in (0, 1, 12, 300)]
    assert_rounds_to(results[0], exactly(q, cache, 0.2), ULPS[torch.bfloat16], tolerance=2e-5)
    assert all(torch.equal(result, results[0]) for result in results)
    with pytest.raises(ValueError, match=r"verify_attention: most_rows must be 0 \(unknown\) or more, not -1"):
        attention(*arguments(q, cache), 0.2, 0, 0.0, -1)


@attention
def test_prefill_and_decoding_mixed(attention: Implementation) -> None:
    """The mean of rows is large, so a block is too; most of the sequences have one."""
    check(attention, [(1, 70), (80, 90), (2, 40)], (8, 1), 16, torch.bfloat16)


@attention
@pytest.mark.parametrize("sequences", [[(0, 0)], [(0, 17), (0, 0), (0, 1)]])
def test_nothing_to_do(attention: Implementation, sequences: list[tuple[int, int]]) -> None:
    check(attention, sequences, (4, 2), 64, torch.float32)


@attention
def test_no_sequences(attention: Implementation) -> None:
    tables, starts, lengths = (torch.zeros(shape, dtype=torch.int32) for shape in ((0, 3), (1,), (0,)))
    cache = torch.zeros(4, 16, 2, 8)
    assert attention(torch.zeros(0, 4, 8), cache, cache, tables, starts, lengths, 1.0).shape == (0, 4, 8)


@attention
def test_sequences_without_queries_or_keys_among_others(attention: Implementation) -> None:
    check(attention, [(0, 0), (0, 33), (3, 20), (0, 0), (1, 1), (0, 5)], (4, 2), 16, torch.float16)


@attention
@every_dtype
def test_large_scores_do_not_overflow(attention: Implementation, dtype: torch.dtype) -> None:
    q, cache = inputs([(2, 50), (1, 3)], (1, 1), 64, dtype, 16)
    q = (q.float() * 500).to(dtype)
    # A score of 1e4 is rounded to 1e-3, and so are the probabilities.
    exact = exactly(q, cache, 1.0)
    torch.testing.assert_close(attention(*arguments(q, cache), 1.0).float(), exact, rtol=1e-2, atol=2e-3)


@attention
def test_rows_do_not_depend_on_the_batch(attention: Implementation) -> None:
    """A window's rows are bit for bit what each would be, had it been decoded alone, and so in other company."""
    q, cache = inputs([(6, 77)], (4, 2), 16, torch.bfloat16, 16)
    together = attention(*arguments(q, cache), 0.25)
    for i in range(6):
        start, length = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([72 + i], dtype=torch.int32)
        caches = (cache.k_cache, cache.v_cache, cache.block_tables)
        alone = attention(q[i : i + 1], *caches, start, length, 0.25)
        assert torch.equal(alone[0], together[i])
    other, more = inputs([(1, 5), (6, 77)], (4, 2), 16, torch.bfloat16, 16)
    pages = more.block_tables[1, :5].long()
    more.k_cache[pages], more.v_cache[pages] = (c[cache.block_tables[0, :5].long()] for c in arguments(q, cache)[1:3])
    company = attention(*arguments(torch.cat((other[:1], q)), more), 0.25)
    assert torch.equal(company[1:], together)


@attention
def test_tables_may_be_views(attention: Implementation) -> None:
    q, cache = inputs([(2, 40), (1, 17)], (2, 1), 16, torch.float32, 16)
    wide = torch.full((2, 11), -1, dtype=torch.int32)
    wide[:, : cache.block_tables.shape[1]] = cache.block_tables
    view = wide[:, : cache.block_tables.shape[1]]
    out = attention(q, cache.k_cache, cache.v_cache, view, cache.query_start, cache.context_lens, 0.25)
    assert_rounds_to(out, exactly(q, cache, 0.25), tolerance=2e-5)


@attention
def test_a_table_without_a_spare_column(attention: Implementation) -> None:
    q, cache = inputs([(2, 32)], (2, 1), 16, torch.bfloat16, 16)
    full = cache.block_tables[:, :2].contiguous()
    out = attention(q, cache.k_cache, cache.v_cache, full, cache.query_start, cache.context_lens, 0.25)
    assert_rounds_to(out, exactly(q, cache, 0.25), tolerance=2e-5)


@attention
def test_offsets_beyond_31_bits(attention: Implementation) -> None:
    """Addresses in a cache of more than 2^31 elements. All but its last page is memory that is never touched."""
    cache = torch.empty(2**21 + 1, 16, 1, 64, dtype=torch.bfloat16)
    cache[-1] = torch.randn(16, 1, 64).bfloat16()
    q = torch.randn(1, 2, 64).bfloat16()
    table, start, length = (torch.tensor(x, dtype=torch.int32) for x in ([[2**21]], [0, 1], [11]))
    out = attention(q, cache, cache, table, start, length, 0.125)
    last = cache[-1:].clone()
    exact = reference.verify_attention(q.float(), last.float(), last.float(), table * 0, start, length, 0.125)
    assert_rounds_to(out, exact, tolerance=2e-5)


def bad(name: str, value: Any) -> dict[str, Any]:
    """Good arguments but for one."""
    q, cache = inputs([(2, 20), (1, 5)], (4, 2), 16, torch.float32, 16)
    names = ("q", "k_cache", "v_cache", "block_tables", "query_start", "context_lens")
    given: dict[str, Any] = dict(zip(names, arguments(q, cache), strict=True))
    given[name] = value(given[name])
    return given


@attention
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", lambda x: x.double(), r"verify_attention: q must be float32 or bfloat16 or float16, not torch\.float64"),
        ("k_cache", lambda x: x.int(), "k_cache must be float32 or bfloat16 or float16"),
        ("q", lambda x: x[0], r"q must be \[tokens, heads, head_dim\], not \[4, 16\]"),
        ("q", lambda x: x[..., :12], "head_dim must be a multiple of 8 up to 256, not 12"),
        ("q", lambda x: torch.zeros(3, 4, 264), "head_dim must be a multiple of 8 up to 256, not 264"),
        ("q", lambda x: x[..., ::2], "each row of q must be contiguous"),
        ("q", lambda x: x[:, :3], "3 query heads cannot be divided among 2 KV heads"),
        ("q", lambda x: x.to("meta"), r"q must be torch\.float32 \[3, 4, 16\] on cpu"),
        ("k_cache", lambda x: x[0], r"k_cache must be \[pages, page_size, kv_heads, head_dim\], not \[16, 2, 16\]"),
        ("k_cache", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "k_cache must be contiguous"),
        ("k_cache", lambda x: x[..., :8].contiguous(), r"k_cache must be contiguous torch\.float32 \[6, 16, 2, 16\]"),
        ("v_cache", lambda x: x[1:], r"v_cache must be contiguous torch\.float32 \[6, 16, 2, 16\]"),
        ("v_cache", lambda x: x.bfloat16(), r"v_cache must be contiguous torch\.float32"),
        ("block_tables", lambda x: x[0], r"block_tables must be \[sequences, pages\], not \[4\]"),
        ("block_tables", lambda x: x.long(), r"block_tables must be torch\.int32"),
        ("block_tables", lambda x: x[:1], r"block_tables must be torch\.int32 \[2, 4\]"),
        ("query_start", lambda x: x[1:], r"query_start must be contiguous torch\.int32 \[3\]"),
        ("query_start", lambda x: x.long(), r"query_start must be contiguous torch\.int32"),
        ("context_lens", lambda x: x.long(), r"context_lens must be contiguous torch\.int32 \[2\]"),
    ],
)
def test_bad_input_is_refused(attention: Implementation, name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**bad(name, value), scale=1.0)

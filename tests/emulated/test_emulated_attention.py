"""verify_attention of the GPU providers, on CPU tensors; then how the Triton provider divides it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ops_support import (
    ULPS,
    Implementation,
    Paged,
    assert_close_by_head,
    assert_rounds_to,
    emulated,
    paged,
    some_sinks,
    strided_rows,
    triton_function,
)
from torch import Tensor

from pearl_kernels import reference
from pearl_kernels.triton import attention as triton_attention
from pearl_kernels.triton.attention_plan import MERGED_SPLITS, WINDOW_ROWS, Plan, Tile, row_blocks

# Rows of a block that no sequence has see no keys; numpy, which the interpreter computes with, warns.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
attend = triton_function(triton_attention.attend)
attention = pytest.mark.parametrize("attention", emulated("verify_attention"))
every_dtype = pytest.mark.parametrize("dtype", ULPS, ids=("fp32", "bf16", "fp16"))

# (queries, context) of each sequence: a whole prompt, a window, none, decoding, a chunk
MIXED = [(2, 2), (5, 67), (0, 9), (1, 1), (12, 40)]


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """What a provider allocates and does not write, outputs and partial results, is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def inputs(
    sequences: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, page_size: int
) -> tuple[Tensor, Paged]:
    """Query rows that lie apart, and a poisoned cache."""
    queries, contexts = zip(*sequences, strict=True)
    cache = paged(queries, contexts, heads[1], head_dim, page_size, dtype)
    return strided_rows((torch.randn(sum(queries), heads[0], head_dim) * 2).to(dtype)), cache


def arguments(q: Tensor, cache: Paged) -> tuple[Tensor, ...]:
    return q, cache.k_cache, cache.v_cache, cache.block_tables, cache.query_start, cache.context_lens


def exactly(q: Tensor, cache: Paged, *how: Any) -> Tensor:
    index = (cache.block_tables, cache.query_start, cache.context_lens)
    return reference.verify_attention(q.float(), cache.k_cache.float(), cache.v_cache.float(), *index, *how)


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


# ---- Triton: splits -------------------------------------------------------------------------------------------------


def cut_attend(
    q: Tensor, cache: Paged, split_keys: int, scale: float = 0.25, window: int = 0, softcap: float = 0.0,
    block_m: int = 16, block_n: int = 32, at_once: int = 1 << 20, programs: int = 2,
) -> Tensor:  # fmt: skip
    """What is not written is NaN. The caller's tables may have columns without pages: splits that no sequence has."""
    (tokens, heads, _), sequences = q.shape, len(cache.context_lens)
    group = heads // cache.k_cache.shape[2]
    splits = max(-(-cache.block_tables.shape[1] * cache.k_cache.shape[1] // split_keys), 1)
    tile = Tile(block_m, block_n, num_warps=4, num_stages=3)
    by_sequence = tokens > WINDOW_ROWS * sequences
    rows = WINDOW_ROWS * sequences if by_sequence else tokens
    each = -(-WINDOW_ROWS * group // block_m)
    blocks = each * sequences if by_sequence else row_blocks(tokens, sequences, group, block_m)
    cut = Plan(tile, tile, split_keys, splits, min(at_once, splits), min(programs, splits), blocks, rows, by_sequence)
    with new_memory_is_nan():
        result = attend(*arguments(q, cache), scale, window, softcap, cut)
    assert isinstance(result, Tensor)
    return result


# Contexts that end before, at and after a split's boundary; a chunk whose rows see different numbers of splits.
UNEVEN = [(1, 31), (1, 64), (1, 65), (0, 40), (9, 130), (4, 4)]


@pytest.mark.parametrize("window", [0, 1, 30, 70])
@pytest.mark.parametrize(("split_keys", "programs"), [(160, 1), (32, 1), (32, 3), (64, 2)])
def test_splits_match_reference(split_keys: int, programs: int, window: int) -> None:
    q, cache = inputs(UNEVEN, (2, 1), 16, torch.float32, 16)
    out = cut_attend(q, cache, split_keys, window=window, programs=programs)
    assert_rounds_to(out, exactly(q, cache, 0.25, window), tolerance=2e-6)


@every_dtype
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_splits_agree_to_the_output_s_rounding(dtype: torch.dtype, softcap: float) -> None:
    q, cache = inputs([(3, 200), (1, 17)], (4, 2), 24, dtype, 16)
    out = cut_attend(q, cache, 64, softcap=softcap)
    assert out.dtype == dtype
    assert_rounds_to(out, exactly(q, cache, 0.25, 0, softcap), ULPS[dtype], tolerance=2e-5)


@pytest.mark.parametrize("window", [0, 300])
def test_passes_over_some_splits_each_give_the_same_bits(window: int) -> None:
    """Three passes, of 16 splits of 16 keys: some rows end in the first, some begin in the second."""
    sequences = [(2, 16 * (2 * MERGED_SPLITS + 3)), (1, 250), (3, 258), (1, 5), (1, 16 * 2 * MERGED_SPLITS)]
    q, cache = inputs(sequences, (2, 1), 16, torch.float32, 16)
    cache.k_cache[cache.block_tables[0, 2 * MERGED_SPLITS + 1].item(), :8] = q[0, :1] / 2  # the peak is in the last one
    out = cut_attend(q, cache, 16, window=window, block_n=16)
    assert_rounds_to(out, exactly(q, cache, 0.25, window), tolerance=2e-6)
    for programs in (1, 5):
        passes = cut_attend(q, cache, 16, window=window, block_n=16, at_once=MERGED_SPLITS, programs=programs)
        assert torch.equal(passes, out)


def test_scores_that_differ_widely_between_splits() -> None:
    """A split may have all of the mass, and its neighbours none that fp32 can hold."""
    q, cache = inputs([(2, 128)], (1, 1), 16, torch.float32, 16)
    for index, factor in enumerate((1e-3, 40.0, 1.0, 0.0)):
        for page in cache.block_tables[0, 2 * index : 2 * index + 2].tolist():
            cache.k_cache[page] *= factor
    out = cut_attend(q, cache, 32, scale=1.0)
    torch.testing.assert_close(out, exactly(q, cache, 1.0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("block_m", "split_keys"), [(16, 128), (32, 128), (64, 128), (128, 128), (32, 64)])
def test_blocks_of_rows_match_reference(block_m: int, split_keys: int) -> None:
    q, cache = inputs([(1, 9), (7, 80), (22, 33), (34, 90)], (3, 1), 16, torch.bfloat16, 16)
    out = cut_attend(q, cache, split_keys, block_m=block_m)
    assert_rounds_to(out, exactly(q, cache, 0.25), tolerance=2e-5)


@pytest.mark.parametrize("block_m", [16, 64])
def test_prompts_beside_split_sequences(block_m: int) -> None:
    """Rows of partial results are counted by sequence; 32 rows are split, 33 are not."""
    q, cache = inputs([(100, 100), (1, 130), (32, 97), (33, 97)], (3, 1), 16, torch.float32, 16)
    assert_rounds_to(cut_attend(q, cache, 32, block_m=block_m), exactly(q, cache, 0.25), tolerance=2e-6)


def test_more_sequences_than_are_searched_at_once() -> None:
    sequences = [(int(r % 63 == 2), 1 + r % 3) for r in range(130)]
    q, cache = inputs(sequences, (2, 1), 8, torch.float32, 4)
    assert_rounds_to(cut_attend(q, cache, 32), exactly(q, cache, 0.25), tolerance=2e-6)


@pytest.mark.parametrize("split_keys", [128, 32])
def test_rows_of_no_sequence_are_left_alone(split_keys: int) -> None:
    """A captured graph's padding: rows past the last sequence's, and sequences without queries."""
    q, cache = inputs([(2, 60), (1, 33), (0, 0)], (2, 1), 16, torch.float32, 16)
    padded = torch.cat((q, torch.full((4, 2, 16), torch.nan)))
    out = cut_attend(padded, cache, split_keys)
    assert_rounds_to(out[:3], exactly(q, cache, 0.25), tolerance=2e-6)
    assert out[3:].isnan().all()


def test_a_context_beyond_the_block_table_is_not_followed() -> None:
    """Such a call is wrong; but nothing past a table's end is looked up, and the rows get what the table has."""
    for rows in (1, 40):
        q, cache = inputs([(rows, 200)], (2, 1), 16, torch.float32, 16)
        tables = cache.block_tables[:, :7].contiguous()
        narrow = Paged(cache.k_cache, cache.v_cache, tables, cache.query_start, cache.context_lens)
        held = Paged(cache.k_cache, cache.v_cache, tables, cache.query_start, torch.tensor([112], dtype=torch.int32))
        last = cut_attend(q, narrow, 32)[-1]
        assert_rounds_to(last[None], exactly(q, held, 0.25)[-1:], tolerance=2e-6)

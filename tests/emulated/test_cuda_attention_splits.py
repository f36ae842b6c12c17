"""CUDA's verify_attention over several splits of the keys: a row's bits, and who merges them."""

from __future__ import annotations

import pytest
import torch
from cuda_attention import BF16, FP32, HALF_ULPS, arguments, attention, exact, only, run
from cuda_emu import build
from emulated_attention import inputs
from ops_support import Paged, assert_rounds_to, some_sinks, strided_rows
from torch import Tensor

from pearl_kernels.checks import Checks
from pearl_kernels.native import NativeLayers

pytestmark = build.on_linux

# With 256 keys in a split, and groups of 8: long ones of two groups, ones that begin a group or a split with their last
# rows only, short ones that are not split, a prompt's chunk that is not either.
MIXED = [(1, 30), (5, 2310), (2, 257), (0, 700), (9, 2050), (40, 600), (1, 256), (1, 1)]


def test_mixed_contexts_match_reference() -> None:
    for dtype, heads, window in ((BF16, (4, 1), 0), (FP32, (2, 1), 0), (BF16, (2, 2), 1900)):
        q, cache = inputs(MIXED, heads, 40, dtype)
        assert_rounds_to(run(attention, q, cache, window), exact(q, cache, window), HALF_ULPS[dtype], tolerance=2e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=("fp32", "bf16"))
def test_a_row_s_bits_are_the_same_alone_and_in_any_batch(dtype: torch.dtype) -> None:
    """Whatever the others are, how wide the block tables, and what the host knows of the rows."""
    q, cache = inputs(MIXED, (4, 1), 64, dtype)
    together = run(attention, q, cache)
    starts = cache.query_start.tolist()
    for chosen in ([0], [1], [4], [5], [6], [1, 0, 2], [4, 6, 7, 3], [2, 5, 1]):
        rows = [row for r in chosen for row in range(starts[r], starts[r + 1])]
        assert torch.equal(run(attention, *only(q, cache, chosen)), together[rows]), chosen
    for most_rows in (1, 5, 9, 40):
        assert torch.equal(run(attention, q, cache, most_rows=most_rows), together), most_rows


@pytest.mark.parametrize(("dtype", "window"), [(FP32, 0), (BF16, 0), (BF16, 1900)])
def test_a_block_that_walks_over_a_group_s_splits_gives_the_same_bits(dtype: torch.dtype, window: int) -> None:
    """Tables for a million keys: the partial results of all splits would take more than 256 MiB."""
    q, cache, sinks = *inputs(MIXED, (4, 1), 64, dtype), some_sinks(4)
    missing = (1 << 20) // 16 - cache.block_tables.shape[1]
    tables = torch.nn.functional.pad(cache.block_tables, (0, missing), value=-(2**31))
    wide = Paged(cache.k_cache, cache.v_cache, tables, cache.query_start, cache.context_lens)
    size = build.module("attention.cu").verify_attention_workspace(*arguments(q, wide, q), (0, 0))
    slots, blocks = (1 << 20) // 256 // 8, (59 * 4 // 16 if dtype is FP32 else 59 * 4 // 32) + 8
    assert size == 59 * 4 * slots * (64 + 2 * 64 // 4) * 4 + blocks * 4
    assert torch.equal(run(attention, q, wide, window), run(attention, q, cache, window))
    sunk = run(attention, q, wide, window, sinks=sinks)
    assert torch.equal(sunk, run(attention, q, cache, window, sinks=sinks))
    assert_rounds_to(sunk, exact(q, cache, window, sinks=sinks), HALF_ULPS[dtype], tolerance=2e-5)


def test_with_more_heads_splits_are_longer_and_as_independent() -> None:
    q, cache = inputs([(2, 1100), (1, 20), (1, 513)], (4, 4), 64, BF16)
    together = run(attention, q, cache)
    assert_rounds_to(together, exact(q, cache), HALF_ULPS[BF16], tolerance=2e-5)
    for chosen, rows in (([0], [0, 1]), ([1], [2]), ([2], [3])):
        assert torch.equal(run(attention, *only(q, cache, chosen)), together[rows])


@pytest.mark.parametrize(("dtype", "rows"), [(BF16, 1), (BF16, 9), (FP32, 2)])
def test_nothing_hangs_on_the_order_of_blocks_threads_or_copies(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block that merges is another one each time."""
    q, cache = inputs([(rows, 2300), (1, 90)], (8, 1), 64, dtype)
    results = []
    for order in ("ascending", "descending"):
        for copies in ("early", "late"):
            monkeypatch.setenv("PEARL_EMU_ORDER", order)
            monkeypatch.setenv("PEARL_EMU_ASYNC", copies)
            results.append(run(attention, q, cache))
    assert_rounds_to(results[0], exact(q, cache), HALF_ULPS[dtype], tolerance=2e-5)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("most", [64, 6, 5, 0])
def test_counters_are_used_if_they_suffice_and_are_left_zero(most: int) -> None:
    """Two sequences of two groups each have six counters; what the workspace holds at first does not matter."""
    q, cache = inputs([(2, 2100), (1, 2060)], (2, 1), 64, BF16)
    counters = torch.zeros(most, dtype=torch.int32)
    asked: list[int] = []

    def poisoned(like: Tensor, size: int) -> Tensor:
        asked.append(size)
        return like.new_full((size,), 0xFF, dtype=torch.uint8)

    checks = Checks("cpu", (BF16,))
    layers = NativeLayers(build.module("attention.cu"), checks, lambda _: (0, 0), poisoned, lambda _: counters)
    plain = run(attention, q, cache)
    for _ in range(3):
        assert torch.equal(run(layers.verify_attention, q, cache), plain)
        assert not counters.any()
    partials = 3 * 2 * (9 + 2) * (64 + 2) * 4
    assert set(asked) == {partials if most >= 6 else partials + 6 * 4}


def test_a_prompt_is_not_split_and_only_others_have_partial_results() -> None:
    """Of each sequence of a batch with a prompt, 32 rows; a prompt by itself needs no workspace."""
    module = build.module("attention.cu")

    def asked(q: Tensor, cache: Paged) -> int:
        size: int = module.verify_attention_workspace(*arguments(q, cache, torch.empty(q.shape)), (0, 0))
        return size

    row = 2 * 4 * (64 + 2) * 4  # two heads, four splits
    blocks = 70 * 2 // 64 + 2
    q, cache = inputs([(65, 900), (5, 600)], (2, 1), 64, BF16)
    assert asked(q, cache) == 2 * 32 * row + blocks * 4
    assert asked(*only(q, cache, [0])) == 0
    assert asked(*only(q, cache, [1])) == 5 * row // 4 * 3 + 4
    assert_rounds_to(run(attention, q, cache), exact(q, cache), HALF_ULPS[BF16], tolerance=2e-5)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=("fp32", "bf16"))
def test_the_longest_sequence_that_is_split_and_the_shortest_that_is_not(dtype: torch.dtype) -> None:
    """32 and 33 rows; beside a prompt each sequence has as many rows of partial results as the first needs."""
    q, cache = inputs([(33, 600), (32, 600), (33, 300), (60, 600)], (1, 1), 64, dtype)
    together = run(attention, q, cache)
    assert_rounds_to(together, exact(q, cache), HALF_ULPS[dtype], tolerance=2e-5)
    assert torch.equal(run(attention, *only(q, cache, [1])), together[33:65])
    assert torch.equal(run(attention, *only(q, cache, [2])), together[65:98])


def test_a_context_beyond_the_block_table_is_not_followed() -> None:
    """Such a call is wrong; but nothing past a table's end is looked up, and nothing is written where it must not."""
    for length, pages in ((300, 10), (900, 40)):
        q, cache = inputs([(1, length)], (2, 1), 64, BF16)
        tables = cache.block_tables[:, :pages].contiguous()
        narrow = Paged(cache.k_cache, cache.v_cache, tables, cache.query_start, cache.context_lens)
        assert run(attention, q, narrow).isfinite().all()


def test_queries_that_lie_apart_change_nothing() -> None:
    q, cache = inputs([(2, 700)], (2, 1), 64, BF16)
    assert torch.equal(run(attention, strided_rows(q), cache), run(attention, q.contiguous(), cache))

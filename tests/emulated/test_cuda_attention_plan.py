"""How CUDA's verify_attention is cut into blocks, and how many stages their rings of tiles have: only sizes."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
from cuda_emu import build

pytestmark = build.on_linux
KIB = 1024
FP32, BF16 = 0, 1
H100, A100, CARD = (227 * KIB, 228 * KIB), (163 * KIB, 164 * KIB), (99 * KIB, 100 * KIB)  # of a block, of all


class Cut(NamedTuple):
    rows: int
    blocks: int
    splits: int
    groups: int
    partial_rows: int
    partial_bytes: int
    slots: int
    counters: int
    walk: int  # splits of a block


def cut(
    sequences: int, tokens: int, capacity: int, heads: tuple[int, int] = (32, 8), head_dim: int = 128,
    dtype: int = BF16, most_rows: int = 0,
) -> Cut:  # fmt: skip
    function = build.library(build.SHIM / "attention_plan.cu").run_cut
    found = (ctypes.c_int64 * 9)()
    sizes = map(ctypes.c_int64, (sequences, tokens, *heads, head_dim, capacity, most_rows))
    function(ctypes.c_int(dtype), *sizes, found)
    return Cut(*found)


def stages(other: int, stage: int, resident: int, device: tuple[int, int]) -> int:
    function = build.library(build.SHIM / "attention_plan.cu").run_stages
    result: int = function(ctypes.c_int64(other), ctypes.c_int64(stage), resident, *device)
    return result


def test_splits_do_not_depend_on_the_batch() -> None:
    assert {cut(n, n * rows, 8192).splits for n in (1, 2, 31, 64) for rows in (1, 4, 9, 32)} == {16}
    assert [cut(1, 1, capacity).splits for capacity in (16, 512, 528, 4096, 32768)] == [1, 1, 2, 8, 64]
    assert [cut(1, 1, 8192, heads).splits for heads in ((64, 8), (8, 4), (12, 2), (8, 1))] == [16, 16, 32, 32]


def test_at_batch_1_every_multiprocessor_of_an_h100_has_a_block() -> None:
    for capacity in (8192, 16384, 32768):
        for rows in (1, 9):
            plan = cut(1, rows, capacity)
            assert plan.rows >= rows * 4  # so that one block has them all
            assert plan.splits * 8 >= 0.95 * 132


def test_partial_results_are_an_eighth_of_the_keys_and_values_at_most() -> None:
    for rows in (1, 4, 9, 16):
        plan = cut(1, rows, 32768)
        keys_and_values = 32768 * 8 * 128 * 2 * 2
        assert plan.partial_rows == rows
        assert plan.partial_bytes * 8 <= keys_and_values * 1.15  # with the groups' and each row's peak and mass


def test_prompts_are_not_split_and_others_are_beside_them() -> None:
    assert cut(1, 32, 8192).splits == 16
    assert cut(1, 33, 8192).splits == 1
    mixed = cut(4, 2048, 8192)
    assert (mixed.splits, mixed.partial_rows) == (16, 4 * 32)
    assert cut(4, 128, 8192).partial_rows == 128


def test_where_partial_results_are_too_many_a_block_walks_over_a_group_s_splits() -> None:
    """More than 256 MiB; then only groups have some, whose peaks and masses take half as much again."""
    plan = cut(8, 72, 32768)
    assert (plan.splits, plan.slots, plan.walk) == (64, 64 + 8, 1)
    assert plan.partial_bytes == 72 * 32 * 72 * 130 * 4
    plan = cut(64, 64 * 9, 32768)
    assert (plan.splits, plan.slots, plan.walk) == (64, 8, 8)
    assert plan.partial_bytes == 64 * 9 * 32 * 8 * 192 * 4
    assert plan.counters == plan.blocks
    assert cut(64, 64 * 9, 131072).partial_bytes < 512 << 20


def test_partial_results_beyond_a_gibibyte_are_not_made() -> None:
    assert cut(256, 256 * 9, 131072)[2:] == (1, 1, 256 * 9, 0, 1, 0, 1)


def test_groups_of_splits_have_a_counter_each_and_one_for_all() -> None:
    plan = cut(3, 3, 8192)
    assert (plan.groups, plan.slots, plan.blocks) == (2, 18, 3 * 8)
    assert plan.counters == plan.blocks * 3
    plan = cut(3, 3, 4096)
    assert (plan.groups, plan.slots, plan.counters) == (1, 8, plan.blocks)
    assert cut(3, 3, 512).counters == 0


@pytest.mark.parametrize(
    ("tokens", "sequences", "most_rows", "rows"),
    [
        (8, 1, 0, 32),
        (8, 2, 0, 16),  # a graph's padding looks like a sequence
        (8, 2, 8, 32),
        (10, 2, 9, 64),
        (4, 4, 1, 16),
        (9, 1, 1000, 64),  # a hint may be anything
        (3, 1, 1000, 16),
    ],
)
def test_a_block_has_the_rows_of_the_longest_sequence(tokens: int, sequences: int, most_rows: int, rows: int) -> None:
    assert cut(sequences, tokens, 8192, most_rows=most_rows).rows == rows
    assert cut(sequences, tokens, 8192, head_dim=256, most_rows=most_rows).rows == min(rows, 32)
    assert cut(sequences, tokens, 8192, dtype=FP32, most_rows=most_rows).rows == 16


@pytest.mark.parametrize(
    ("queries", "stage", "resident", "h100", "a100", "card"),
    [
        (2, 16, 2, 4, 4, 2),  # D = 64, 16 rows
        (4, 32, 2, 3, 2, 2),  # D = 128, 16 rows
        (8, 32, 2, 3, 2, 2),  # 32 rows
        (16, 32, 1, 4, 4, 2),  # 64 rows: one block a multiprocessor
        (8, 64, 2, 3, 2, 2),  # D = 256: two blocks do not fit, one has all
        (16, 64, 1, 3, 2, 2),
    ],
)
def test_a_ring_has_the_stages_for_which_there_is_room(
    queries: int, stage: int, resident: int, h100: int, a100: int, card: int
) -> None:
    found = [stages(queries * KIB, stage * KIB, resident, device) for device in (H100, A100, CARD)]
    assert found == [h100, a100, card]

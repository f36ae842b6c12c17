"""How Triton's verify_attention is cut into programs: only sizes."""

from __future__ import annotations

import pytest
import torch

from pearl_kernels.triton.attention_plan import (
    MERGED_SPLITS,
    MOST_WORKSPACE,
    WINDOW_ROWS,
    Gpu,
    Plan,
    plan,
    row_blocks,
    split_keys_of,
)

BF16, H100 = torch.bfloat16, Gpu(cores=132, shared=227 * 1024)


def planned(
    tokens: int,
    sequences: int,
    capacity: int,
    heads: tuple[int, int] = (32, 8),
    dtype: torch.dtype = BF16,
    gpu: Gpu = H100,
) -> Plan:
    return plan(tokens, sequences, heads[0] // heads[1], heads[1], 128, dtype, capacity, gpu)


def partial_bytes(cut: Plan, heads: int = 32) -> int:
    return cut.partial_rows * heads * cut.slots * (128 + 2) * 4


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("heads", [(32, 8), (64, 8), (12, 2)])
def test_tiles_and_splits_follow_from_the_model_alone(heads: tuple[int, int], dtype: torch.dtype) -> None:
    calls = [(1, 1), (6, 1), (32, 32), (192, 32), (256, 256), (2048, 1), (2100, 50), (17, 3)]
    found = set()
    for tokens, sequences in calls:
        for capacity in (0, 1, 128, 129, 4096, 40960, 131072):
            for cores in (1, 66, 132):
                cut = planned(tokens, sequences, capacity, heads, dtype, Gpu(cores, H100.shared))
                found.add((cut.tile, cut.split_keys))
                assert cut.split_keys % cut.tile.block_n == 0
                assert cut.splits == max(-(-capacity // cut.split_keys), 1)
                assert 1 <= cut.programs <= cut.at_once <= cut.splits
                assert (cut.prompt_tile is not None) == (tokens > WINDOW_ROWS)
    assert len(found) == 1


def test_splits_are_the_same_as_the_cuda_kernel_s() -> None:
    assert [split_keys_of(heads) for heads in (1, 2, 3, 4, 8)] == [256, 256, 256, 512, 512]


def test_at_batch_1_every_multiprocessor_of_an_h100_has_a_program() -> None:
    for capacity in (8192, 16384, 32768):
        for rows in (1, 9, 16):
            cut = planned(rows, 1, capacity)
            assert cut.tile.block_m >= rows * 4  # keys are read once
            assert cut.programs == cut.splits
            assert cut.splits * 8 >= 0.95 * 132


def test_programs_are_bounded_whatever_the_tables_width() -> None:
    """Most of them leave at once, if sequences are shorter than the tables; each takes its turn."""
    for tokens, sequences in ((1, 1), (9, 1), (72, 8), (576, 64), (2048, 1), (4096, 9)):
        for capacity in (512, 8192, 131072):
            cut = planned(tokens, sequences, capacity)
            assert cut.blocks * 8 * (cut.programs - 1) < 8 * 132
    assert planned(4096, 1, 131072).blocks == WINDOW_ROWS * 4 // 64  # not as many as the prompt has


@pytest.mark.parametrize(
    ("tokens", "sequences", "capacity", "at_once", "mebibytes"),
    [
        (9, 1, 131072, 256, 37),
        (72, 8, 32768, 64, 73),
        (576, 64, 32768, 48, 448),  # all 64 would be 585 MiB
        (576, 64, 131072, 48, 448),
        (2304, 256, 131072, 16, 622),  # the least
        (4096, 4, 32768, 64, 130),  # of each sequence 32 rows
        (256, 256, 8192, 16, 65),
    ],
)
def test_partial_results_are_bounded_by_passes(
    tokens: int, sequences: int, capacity: int, at_once: int, mebibytes: int
) -> None:
    cut = planned(tokens, sequences, capacity)
    assert cut.at_once == at_once
    assert cut.at_once in (cut.splits, *range(MERGED_SPLITS, cut.splits, MERGED_SPLITS))
    assert round(partial_bytes(cut) / 2**20) == mebibytes
    assert partial_bytes(cut) <= MOST_WORKSPACE or cut.at_once == MERGED_SPLITS


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("block_m", [16, 128])
def test_row_blocks_suffice(group: int, block_m: int) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(50):
        queries = torch.randint(0, 90, (9,), generator=generator) * (torch.rand(9, generator=generator) < 0.7)
        starts = torch.tensor([0, *queries.tolist()]).cumsum(0)
        first = starts * group // block_m + torch.arange(10)
        needed = -(-queries * group // block_m)
        assert (first[:-1] + needed <= first[1:]).all()
        assert first[-1] == row_blocks(int(starts[-1]), 9, group, block_m)

"""How the Triton provider divides verify_attention: splits of a context, blocks of rows, passes."""

from __future__ import annotations

import pytest
import torch
from emulated_attention import arguments, exactly, inputs, new_memory_is_nan
from ops_support import ULPS, Paged, assert_rounds_to, triton_function
from torch import Tensor

from pearl_kernels.triton import attention as triton_attention
from pearl_kernels.triton.attention_plan import MERGED_SPLITS, WINDOW_ROWS, Plan, Tile, row_blocks

# Rows of a block that no sequence has see no keys; numpy, which the interpreter computes with, warns.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
attend = triton_function(triton_attention.attend)


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


@pytest.mark.parametrize("dtype", ULPS, ids=("fp32", "bf16", "fp16"))
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

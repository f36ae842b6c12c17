"""Triton's verify_attention, in its interpreter: a row's bits do not hang on its company, the tables or the GPU.

What the interpreter cannot show, that the compiler orders a row's sums the same way whatever the call is, follows from
there being one tile for each kind of sequence (``test_triton_attention_plan.py``).
"""

from __future__ import annotations

import pytest
import torch
from cuda_attention import BF16, FP32, HALF_ULPS, exact, only, run
from emulated_attention import inputs
from ops_support import Paged, assert_rounds_to, emulated
from torch import Tensor

from pearl_kernels.triton import attention as triton_attention
from pearl_kernels.triton.attention_plan import Gpu

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning")
(attention,) = (parameter.values[0] for parameter in emulated("verify_attention") if parameter.id == "triton")

# With 256 keys in a split: sequences of several, ones that begin one with their last rows only, short ones, and a
# prompt's chunk, which is not split.
MIXED = [(1, 30), (5, 800), (2, 257), (0, 700), (9, 517), (40, 300), (1, 256), (1, 1), (32, 520)]


def widened(cache: Paged, columns: int) -> Paged:
    tables = torch.nn.functional.pad(cache.block_tables, (0, columns), value=-(2**31))
    return Paged(cache.k_cache, cache.v_cache, tables, cache.query_start, cache.context_lens)


def rows_of(cache: Paged, chosen: list[int]) -> list[int]:
    starts = cache.query_start.tolist()
    return [row for r in chosen for row in range(starts[r], starts[r + 1])]


@pytest.mark.parametrize(("dtype", "window"), [(FP32, 0), (BF16, 0), (BF16, 400)])
def test_a_row_s_bits_are_the_same_alone_and_in_any_batch(dtype: torch.dtype, window: int) -> None:
    """Long and short, windows and prompts; tables as wide as the chosen sequences need."""
    q, cache = inputs(MIXED, (2, 1), 24, dtype)
    together = run(attention, q, cache, window)
    assert_rounds_to(together, exact(q, cache, window), HALF_ULPS[dtype], tolerance=2e-5)
    for chosen in ([0], [1], [2], [4], [5], [6], [8], [4, 6, 7, 3], [5, 1, 0]):
        assert torch.equal(run(attention, *only(q, cache, chosen), window), together[rows_of(cache, chosen)]), chosen


def test_more_sequences_and_wider_tables_change_nothing() -> None:
    q, cache = inputs([(5, 700), (2, 257)] + [(1, 3)] * 12, (2, 1), 24, BF16)
    alone = run(attention, *only(q, cache, [0]))
    assert torch.equal(run(attention, q, cache)[:5], alone)
    assert torch.equal(run(attention, *only(q, widened(cache, 0), [0, 1]))[:5], alone)
    for columns in (1, 300):
        assert torch.equal(run(attention, q, widened(cache, columns))[:5], alone)


def test_a_prompt_s_bits_are_the_same_beside_windows_and_other_prompts() -> None:
    q, cache = inputs([(70, 700), (1, 1000), (5, 300), (33, 33)], (2, 1), 24, BF16)
    together = run(attention, q, cache)
    assert_rounds_to(together, exact(q, cache), HALF_ULPS[BF16], tolerance=2e-5)
    for chosen in ([0], [1], [2], [3], [3, 0], [1, 3], [2, 1]):
        assert torch.equal(run(attention, *only(q, cache, chosen)), together[rows_of(cache, chosen)]), chosen


def test_the_number_of_multiprocessors_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, cache = inputs([(5, 1300), (2, 257), (40, 100)], (2, 1), 24, FP32)
    results: list[Tensor] = []
    for cores in (1, 7, 132):

        def gpu(device: torch.device, cores: int = cores) -> Gpu:
            return Gpu(cores, 227 * 1024)

        monkeypatch.setattr(triton_attention, "_gpu", gpu)
        results.append(run(attention, q, cache))
    assert all(torch.equal(result, results[0]) for result in results)


def test_with_more_heads_splits_are_longer_and_as_independent() -> None:
    q, cache = inputs([(2, 1100), (1, 20), (1, 513)], (4, 4), 24, FP32)
    together = run(attention, q, cache)
    for chosen in ([0], [1], [2]):
        assert torch.equal(run(attention, *only(q, cache, chosen)), together[rows_of(cache, chosen)])


def test_a_window_s_row_has_the_bits_of_the_same_row_decoded() -> None:
    """What greedy verification compares: keys up to the row's own position, whatever rows follow."""
    q, cache = inputs([(9, 1030)], (2, 1), 24, BF16)
    together = run(attention, q, cache)
    for row in (0, 2, 3, 8):
        length = torch.tensor([1022 + row], dtype=torch.int32)
        one = Paged(cache.k_cache, cache.v_cache, cache.block_tables, torch.tensor([0, 1], dtype=torch.int32), length)
        assert torch.equal(run(attention, q[row : row + 1], one)[0], together[row])

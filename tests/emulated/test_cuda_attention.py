"""What is special to CUDA's verify_attention: its block sizes, alignment, workspace and refusals."""

from __future__ import annotations

import pytest
import torch
from cuda_attention import BF16, FP16, FP32, HALF_ULPS, arguments, attention, exact, run
from cuda_emu import build
from emulated_attention import inputs
from ops_support import Paged, assert_rounds_to, strided_rows

pytestmark = build.on_linux


@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "window", "softcap"),
    [((8, 2), 64, 16, 0, 0.0), ((6, 3), 128, 48, 300, 0.0), ((8, 1), 256, 1, 0, 20.0), ((3, 1), 40, 32, 257, 5.0)],
)
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=("fp32", "bf16", "fp16"))
def test_split_contexts_match_reference(
    heads: tuple[int, int], head_dim: int, page_size: int, window: int, softcap: float, dtype: torch.dtype
) -> None:
    q, cache = inputs([(5, 600), (0, 9), (1, 257), (3, 770), (2, 256)], heads, head_dim, dtype, page_size)
    out = run(attention, q, cache, window, softcap)
    assert out.dtype == dtype
    assert_rounds_to(out, exact(q, cache, window, softcap), HALF_ULPS[dtype], tolerance=2e-5)


@pytest.mark.parametrize(("q_dtype", "dtype"), [(FP32, BF16), (FP16, BF16), (BF16, FP16), (FP16, FP32)])
def test_queries_of_another_dtype_are_not_rounded(q_dtype: torch.dtype, dtype: torch.dtype) -> None:
    _, cache = inputs([(3, 300), (1, 40)], (4, 2), 64, dtype)
    q = strided_rows((torch.randn(4, 4, 64) * 2).to(q_dtype))
    assert_rounds_to(run(attention, q, cache), exact(q, cache), HALF_ULPS[q_dtype], tolerance=2e-5)


@pytest.mark.parametrize(("heads", "head_dim", "rows"), [((4, 1), 64, 7), ((8, 1), 128, 9), ((2, 1), 256, 30)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=("fp32", "bf16"))
def test_a_window_gives_each_row_what_decoding_gives_it(
    heads: tuple[int, int], head_dim: int, rows: int, dtype: torch.dtype
) -> None:
    """Bit for bit, though decoding takes blocks of 16 packed rows, and windows of up to 64."""
    q, cache = inputs([(rows, 520), (1, 300)], heads, head_dim, dtype)
    together = run(attention, q, cache)
    start = torch.tensor([0, 1, 1], dtype=torch.int32)
    for i in (0, rows // 2, rows - 1):
        lengths = torch.tensor([520 - rows + 1 + i, 300], dtype=torch.int32)
        alone = Paged(cache.k_cache, cache.v_cache, cache.block_tables, start, lengths)
        assert torch.equal(run(attention, q[i : i + 1], alone)[0], together[i])


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=("fp32", "bf16"))
def test_misaligned_queries_change_nothing(dtype: torch.dtype) -> None:
    q, cache = inputs([(3, 70), (1, 20)], (3, 1), 24, dtype)
    apart = torch.full((4, 3 * 24 + 7), torch.nan, dtype=dtype)
    apart[:, 3:-4] = q.flatten(1)
    assert torch.equal(run(attention, apart[:, 3:-4].unflatten(1, (3, 24)), cache), run(attention, q, cache))


@pytest.mark.parametrize("copies", ["early", "late"])
@pytest.mark.parametrize(("head_dim", "rows"), [(64, 3), (64, 9), (64, 17), (128, 3), (128, 9), (128, 17), (256, 9)])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=("fp32", "bf16"))
def test_where_shared_memory_is_small_rings_of_two_stages_give_the_same_bits(
    dtype: torch.dtype, head_dim: int, rows: int, copies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shim's second device has what cards have; blocks for the widest heads do not fit there."""
    q, cache = inputs([(rows, 300), (1, 40)], (2, 1), head_dim, dtype)
    monkeypatch.setenv("PEARL_EMU_ASYNC", copies)
    on_card = build.operator("verify_attention", device=1)
    if head_dim > 128:
        with pytest.raises(ValueError, match="cannot take these arguments"):
            run(on_card, q, cache)
    else:
        assert torch.equal(run(on_card, q, cache), run(attention, q, cache))


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=("fp32", "bf16"))
def test_rows_before_the_first_key_see_nothing_and_disturb_nobody(dtype: torch.dtype, window: int) -> None:
    """More rows than keys: no caller has that, but a batch's other rows, and those that do see keys, hold."""
    q, cache = inputs([(7, 7), (2, 40)], (4, 1), 64, dtype)
    cache.context_lens[0] = 3  # of its seven rows four have a negative position
    fewer = Paged(cache.k_cache, cache.v_cache, cache.block_tables, cache.query_start - 4, cache.context_lens)
    fewer.query_start[0] = 0
    assert_rounds_to(
        run(attention, q, cache, window)[4:], exact(q[4:], fewer, window), HALF_ULPS[dtype], tolerance=2e-5
    )


def test_more_sequences_than_a_warp_has_lanes() -> None:
    """Of up to two rows each, in no order, and many without any: lanes look for a block's among three."""
    rows = [r * 7 % 5 % 3 for r in range(70)]
    q, cache = inputs([(n, 3 + r) for r, n in enumerate(rows)], (2, 1), 16, BF16)
    assert_rounds_to(run(attention, q, cache), exact(q, cache), HALF_ULPS[BF16], tolerance=2e-5)


def test_rows_that_no_sequence_has_are_left_alone() -> None:
    """A captured graph's batch may be padded."""
    q, cache = inputs([(2, 300), (1, 33)], (4, 2), 64, BF16)
    padded = torch.cat((q, torch.full((40, 4, 64), torch.nan, dtype=BF16)))
    assert torch.equal(run(attention, padded, cache)[:3], run(attention, q, cache))


def test_the_workspace_is_exactly_what_is_asked_for() -> None:
    module = build.module("attention.cu")
    q, cache = inputs([(2, 600), (1, 300)], (4, 2), 64, BF16)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    given = arguments(q, cache, out)
    size = module.verify_attention_workspace(*given, (0, 0))
    assert cache.block_tables.shape[1] * 16 == 640
    blocks = (3 * 2 // 16 + 2) * 2
    assert size == 3 * 4 * 3 * (64 + 2) * 4 + blocks * 4
    held = torch.full((size + 64,), 0xFF, dtype=torch.uint8)
    module.verify_attention(*given, held.data_ptr(), size, (0, 0))
    assert torch.equal(out, run(attention, q, cache))
    assert (held[size:] == 0xFF).all()
    for data, bytes_given in ((held.data_ptr(), size - 1), (held.data_ptr() + 4, size)):
        with pytest.raises(ValueError, match="cannot take these arguments"):
            module.verify_attention(*given, data, bytes_given, (0, 0))


@pytest.mark.parametrize(
    ("position", "value"),
    [(6, 60), (6, 264), (6, 0), (4, 5), (5, 0), (8, 0), (11, 8), (12, 8), (14, 1 << 21), (18, 8), (23, -1)],
    ids=(
        "width-60",
        "width-264",
        "width-0",
        "group",
        "no-kv-heads",
        "page-size",
        "k-cache",
        "v-cache",
        "table-width",
        "out",
        "most-rows",
    ),
)
def test_what_cannot_be_run_is_refused(position: int, value: int) -> None:
    """Before a kernel is launched: the values 8 are addresses that are no multiple of 16."""
    q, cache = inputs([(1, 10)], (4, 2), 64, BF16)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    given = arguments(q, cache, out)
    given[position] = value
    with pytest.raises(ValueError, match="cannot take these arguments"):
        build.module("attention.cu").verify_attention(*given, 0, 0, (0, 0))

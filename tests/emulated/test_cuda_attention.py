"""What is special to CUDA's verify_attention: its splits, block sizes, alignment, workspace and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_emu import build
from ops_support import Paged, assert_rounds_to, paged, strided_rows
from torch import Tensor

from pearl_kernels import reference

pytestmark = build.on_linux

attention = build.operator("verify_attention")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
HALF_ULPS = {FP32: 0.0, BF16: 0.5, FP16: 0.5 * 2.0**-3}  # in bf16's units


def inputs(
    sequences: list[tuple[int, int]], heads: tuple[int, int], head_dim: int, dtype: torch.dtype, page_size: int = 16
) -> tuple[Tensor, Paged]:
    """``sequences``: queries and context of each. Contexts above 256 keys are split on the shim's small device."""
    queries, contexts = zip(*sequences, strict=True)
    q = strided_rows((torch.randn(sum(queries), heads[0], head_dim) * 2).to(dtype))
    return q, paged(queries, contexts, heads[1], head_dim, page_size, dtype)


def run(function: Any, q: Tensor, cache: Paged, window: int = 0, softcap: float = 0.0) -> Tensor:
    index = (cache.block_tables, cache.query_start, cache.context_lens)
    result = function(q, cache.k_cache, cache.v_cache, *index, q.shape[2] ** -0.5, window, softcap)
    assert isinstance(result, Tensor)
    return result


def exact(q: Tensor, cache: Paged, window: int = 0, softcap: float = 0.0) -> Tensor:
    index = (cache.block_tables, cache.query_start, cache.context_lens)
    wide = Paged(cache.k_cache.float(), cache.v_cache.float(), *index)
    return run(reference.verify_attention, q.float(), wide, window, softcap)


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


@pytest.mark.parametrize(("dtype", "rows"), [(BF16, 1), (BF16, 9), (FP32, 2)])
def test_nothing_hangs_on_the_order_of_threads_or_copies(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, cache = inputs([(rows, 400), (1, 90)], (8, 1), 64, dtype)
    results = []
    for order in ("ascending", "descending"):
        for copies in ("early", "late"):
            monkeypatch.setenv("PEARL_EMU_ORDER", order)
            monkeypatch.setenv("PEARL_EMU_ASYNC", copies)
            results.append(run(attention, q, cache))
    assert_rounds_to(results[0], exact(q, cache), HALF_ULPS[dtype], tolerance=2e-5)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=("fp32", "bf16"))
def test_misaligned_queries_change_nothing(dtype: torch.dtype) -> None:
    q, cache = inputs([(3, 70), (1, 20)], (3, 1), 24, dtype)
    apart = torch.full((4, 3 * 24 + 7), torch.nan, dtype=dtype)
    apart[:, 3:-4] = q.flatten(1)
    assert torch.equal(run(attention, apart[:, 3:-4].unflatten(1, (3, 24)), cache), run(attention, q, cache))


def test_rows_that_no_sequence_has_are_left_alone() -> None:
    """A captured graph's batch may be padded."""
    q, cache = inputs([(2, 300), (1, 33)], (4, 2), 64, BF16)
    padded = torch.cat((q, torch.full((40, 4, 64), torch.nan, dtype=BF16)))
    assert torch.equal(run(attention, padded, cache)[:3], run(attention, q, cache))


@pytest.mark.parametrize("rows", [1, 33], ids=("decoding", "a prompt, which is not split"))
def test_sums_over_32k_keys_keep_the_documented_bound(rows: int) -> None:
    """With values above 0, of which tensor cores lose a little at each addition (docs/kernels.md)."""
    n = 32768
    q, cache = inputs([(rows, n)], (1, 1), 64, FP16)
    cache.v_cache.abs_().mul_(0.3).add_(0.5)
    used = cache.block_tables[0, : n // 16].long()
    keys, values = (pages[used].reshape(n, 64).double() for pages in (cache.k_cache, cache.v_cache))
    scores = q[:, 0].double() @ keys.T / 8
    later = torch.arange(n) > (torch.arange(n - rows, n))[:, None]
    expected = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
    error = (run(attention, q, cache)[:, 0].double() - expected) / expected
    assert error.abs().max() < 2.0**-11 + n / 16 * 10 * 2.0**-24  # rounding, and the bound
    assert abs(error.mean()) < 2e-4


def arguments(q: Tensor, cache: Paged, out: Tensor) -> list[Any]:
    """What the compiled module takes, but for the workspace and the stream."""
    (tokens, query_heads, head_dim), (pages, page_size, kv_heads, _) = q.shape, cache.k_cache.shape
    tables = cache.block_tables
    sizes = [len(cache.context_lens), tokens, query_heads, kv_heads, head_dim, pages, page_size]
    caches = [cache.k_cache.data_ptr(), cache.v_cache.data_ptr()]
    index = [tables.data_ptr(), tables.shape[1], tables.stride(0)]
    ranges = [cache.query_start.data_ptr(), cache.context_lens.data_ptr()]
    codes = [{FP32: 0, BF16: 1, FP16: 2}[t.dtype] for t in (q, cache.k_cache)]
    return [*codes, *sizes, q.data_ptr(), q.stride(0), *caches, *index, *ranges, out.data_ptr(), 0.125, 0, 0.0]


def test_the_workspace_is_exactly_what_is_asked_for() -> None:
    module = build.module("attention.cu")
    q, cache = inputs([(2, 600), (1, 300)], (4, 2), 64, BF16)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    given = arguments(q, cache, out)
    size = module.verify_attention_workspace(*given, (0, 0))
    splits = -(-cache.block_tables.shape[1] * 16 // 256)
    assert size == 3 * 4 * splits * (64 + 2) * 4
    held = torch.full((size + 64,), 0xFF, dtype=torch.uint8)
    module.verify_attention(*given, held.data_ptr(), size, (0, 0))
    assert torch.equal(out, run(attention, q, cache))
    assert (held[size:] == 0xFF).all()
    for data, bytes_given in ((held.data_ptr(), size - 1), (held.data_ptr() + 4, size)):
        with pytest.raises(ValueError, match="cannot take these arguments"):
            module.verify_attention(*given, data, bytes_given, (0, 0))


@pytest.mark.parametrize(("tokens", "splits"), [(1, True), (32, True), (128, True), (4096, False)])
def test_windows_are_split_and_prefill_is_not(tokens: int, splits: bool) -> None:
    """Partial results of prefill would take more memory than they are worth. Only sizes are looked at."""
    sizes = [1, tokens, 32, 8, 128, 512, 16]
    given = [1, 1, *sizes, 16, 32 * 128, 16, 16, 16, 512, 512, 16, 16, 16, 0.1, 0, 0.0]
    size = build.module("attention.cu").verify_attention_workspace(*given, (0, 0))
    assert (size > 0) == splits
    assert size <= 256 << 20


@pytest.mark.parametrize(
    ("position", "value"),
    [(6, 60), (6, 264), (6, 0), (4, 5), (5, 0), (8, 0), (11, 8), (12, 8), (18, 8)],
    ids=("width-60", "width-264", "width-0", "group", "no-kv-heads", "page-size", "k-cache", "v-cache", "out"),
)
def test_what_cannot_be_run_is_refused(position: int, value: int) -> None:
    """Before a kernel is launched: the values 8 are addresses that are no multiple of 16."""
    q, cache = inputs([(1, 10)], (4, 2), 64, BF16)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    given = arguments(q, cache, out)
    given[position] = value
    with pytest.raises(ValueError, match="cannot take these arguments"):
        build.module("attention.cu").verify_attention(*given, 0, 0, (0, 0))

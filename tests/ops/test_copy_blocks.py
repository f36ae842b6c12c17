"""copy_blocks: pages move as bytes."""

from __future__ import annotations

import pytest
import torch
from ops_support import Implementation, emulated, implementations
from torch import Tensor

from pearl_kernels.cpu import OPERATORS as CPU

everyone = pytest.mark.parametrize(
    "copy_blocks", implementations("copy_blocks", with_reference=True) + emulated("copy_blocks")
)
cuda = pytest.mark.parametrize("copy_blocks", emulated("copy_blocks"))
# Pages of less than a CUDA thread moves, of odd sizes, of one vector more than a block has, of several blocks.
PAGES = [(1,), (3, 5), (16, 2, 8), (257, 16), (2, 4099, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn]


def any_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Every bit pattern, NaNs too."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


@everyone
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_pages_are_copied_and_all_others_stay(
    copy_blocks: Implementation, dtype: torch.dtype, page: tuple[int, ...]
) -> None:
    torch.manual_seed(3)
    cache = any_bytes((12, *page), dtype)
    before = cache.clone()
    pairs = {11: 0, 2: 1, 4: 9, 7: 9}  # destination: source; one source may have several destinations
    copy_blocks(cache, torch.tensor([[source, destination] for destination, source in pairs.items()]))
    for i in range(12):
        assert torch.equal(bits(cache[i]), bits(before[pairs.get(i, i)])), f"page {i}"


@everyone
def test_no_pairs_and_a_page_onto_itself_change_nothing(copy_blocks: Implementation) -> None:
    cache = torch.randn(4, 6)
    before = cache.clone()
    copy_blocks(cache, torch.zeros(0, 2, dtype=torch.int64))
    copy_blocks(cache, torch.tensor([[2, 2]]))
    copy_blocks(torch.zeros(4, 0), torch.tensor([[0, 1]]))
    assert torch.equal(cache, before)


@everyone
@pytest.mark.parametrize("offset", [0, 1, 2, 8, 16])
def test_a_cache_may_begin_anywhere(copy_blocks: Implementation, offset: int) -> None:
    memory = any_bytes((4 * 48 + 16 + 32,), torch.int8)
    before = memory.clone()
    cache = memory[16 + offset :][: 4 * 48].view(4, 48)
    assert cache.data_ptr() % 16 == offset % 16
    copy_blocks(cache, torch.tensor([[3, 1]]))
    expected = before.clone()
    expected[16 + offset :][: 4 * 48].view(4, 48)[1] = before[16 + offset :][: 4 * 48].view(4, 48)[3]
    assert torch.equal(memory, expected)


@everyone
def test_more_pairs_than_one(copy_blocks: Implementation) -> None:
    cache = torch.arange(600).view(300, 2).clone()
    expected = torch.cat((cache[150:], cache[150:]))
    copy_blocks(cache, torch.stack((torch.arange(150, 300), torch.arange(150)), dim=1))
    assert torch.equal(cache, expected)


@cuda
@pytest.mark.parametrize("page", [-1, 4, 2**31, 2**62, -(2**63)])
def test_a_kernel_does_not_follow_a_page_out_of_range(copy_blocks: Implementation, page: int) -> None:
    """It cannot raise."""
    cache = torch.randn(4, 6)
    before = cache.clone()
    copy_blocks(cache, torch.tensor([[page, 1], [1, page]]))
    assert torch.equal(cache, before)


@pytest.mark.parametrize("page", [-1, 4, 2**31, 2**62, -(2**63)])
@pytest.mark.parametrize("side", ["source", "destination"])
def test_a_page_out_of_range_is_an_error_and_nothing_is_copied(page: int, side: str) -> None:
    cache = torch.randn(4, 6)
    before = cache.clone()
    wrong = [page, 1] if side == "source" else [1, page]
    with pytest.raises(ValueError, match=rf"copy_blocks: a page is {page}, must be below 4"):
        CPU["copy_blocks"](cache, torch.tensor([[0, 3], wrong]))  # the first pair is fine
    assert torch.equal(cache, before)


@pytest.mark.parametrize(
    ("cache", "pairs", "message"),
    [
        (torch.zeros(4, 6)[:, ::2], torch.tensor([[0, 1]]), "cache must be contiguous"),
        (torch.zeros(4, 6), torch.tensor([[0, 1]], dtype=torch.int32), "pairs must be contiguous torch.int64"),
        (torch.zeros(4, 6), torch.tensor([[0, 1, 2]]), "pairs must be contiguous"),
        (torch.zeros(4, 6), torch.tensor([0, 1]), "pairs must be contiguous"),
    ],
)
def test_other_layouts_are_refused(cache: Tensor, pairs: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CPU["copy_blocks"](cache, pairs)

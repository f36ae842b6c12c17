"""copy_blocks of the CUDA provider under the shim: pages move as bytes, whatever their size and alignment."""

from __future__ import annotations

import pytest
import torch
from ops_support import Implementation, emulated
from torch import Tensor

everyone = pytest.mark.parametrize("copy_blocks", emulated("copy_blocks"))

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.bool]
# Bytes of a page: fewer than a thread moves, odd, a vector for each thread and one more, more than a block's stretch.
PAGES = [(1,), (3, 5), (16,), (257, 16), (2, 4099, 3)]


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
    cache = any_bytes((7, *page), dtype)
    before = cache.clone()
    pairs = {6: 0, 2: 1, 4: 0}  # destination: source; one source may have several destinations
    copy_blocks(cache, torch.tensor([[source, destination] for destination, source in pairs.items()]))
    for i in range(7):
        assert torch.equal(bits(cache[i]), bits(before[pairs.get(i, i)])), f"page {i}"


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
def test_what_names_no_copy_changes_nothing(copy_blocks: Implementation) -> None:
    cache = torch.randn(4, 6)
    before = cache.clone()
    copy_blocks(cache, torch.zeros(0, 2, dtype=torch.int64))
    copy_blocks(cache, torch.tensor([[2, 2]]))
    copy_blocks(torch.zeros(4, 0), torch.tensor([[0, 1]]))
    for page in (-1, 4, 2**31, 2**62, -(2**63)):  # a kernel cannot raise: pages that do not exist are not followed
        copy_blocks(cache, torch.tensor([[page, 1], [1, page]]))
    assert torch.equal(cache, before)


@everyone
def test_more_pairs_than_one(copy_blocks: Implementation) -> None:
    cache = torch.arange(600).view(300, 2).clone()
    expected = torch.cat((cache[150:], cache[150:]))
    copy_blocks(cache, torch.stack((torch.arange(150, 300), torch.arange(150)), dim=1))
    assert torch.equal(cache, expected)

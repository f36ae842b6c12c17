"""Where weights lie on a CPU: in memory of their own, each once."""

from __future__ import annotations

import gc
import mmap
import platform
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pearl.models import Decoder, bundled_path, load_model
from pearl.models.weight_memory import WeightMemory, return_freed
from pearl_kernels import LinearWeight, Situation, select

CPU = torch.device("cpu")


def resident(path: Path) -> int:
    """Bytes of a file that this process has mapped and touched."""
    count, of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, *words = line.split()
        if not key.endswith(":"):
            of_file = line.endswith(str(path))
        elif of_file and key == "Rss:":
            count += 1024 * int(words[0])
    return count


def weights_of(model: Decoder) -> list[Tensor]:
    weights = [model.weights.embedding, model.weights.norm, model.weights.head]
    weights += [getattr(layer, field.name) for layer in model.weights.layers for field in fields(layer)]
    return [w.data if isinstance(w, LinearWeight) else w for w in weights if w is not None]


def load(weights: str = "full") -> Decoder:
    kernels = select(Situation("cpu", torch.bfloat16, 64, weights=weights))  # type: ignore[arg-type]
    return load_model(bundled_path("target"), device=CPU, dtype=torch.bfloat16, max_model_len=64, kernels=kernels)


def test_what_is_kept_holds_the_numbers_and_nothing_else() -> None:
    memory, generator = WeightMemory(CPU), torch.Generator().manual_seed(0)
    shapes = [(3, 5), (1,), (0, 4), (7, 1, 3), (1 << 20, 20)]
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        whole = [torch.randint(-99, 99, (2, *shape), generator=generator).to(dtype) for shape in shapes]
        kept = [memory.keep(tensor[1]) for tensor in whole]
        for tensor, copy in zip(whole, kept, strict=True):
            expected = tensor[1].clone()
            tensor.zero_()
            assert torch.equal(copy, expected)
            assert copy.is_contiguous()
            assert copy.dtype is dtype
            assert copy.data_ptr() % 64 == 0 or not copy.numel()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages on this system")
def test_memory_begins_where_a_huge_page_does(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = mmap.mmap
    spacers: list[mmap.mmap] = []

    class Odd(mmap.mmap):
        def __new__(cls, file: int, size: int, **options: int) -> Odd:  # as a kernel that does not look at the size
            spacers.append(plain(-1, 12 << 10))
            return super().__new__(cls, file, size + (8 << 10), **options)

    monkeypatch.setattr("pearl.models.weight_memory.mmap.mmap", Odd)
    memory = WeightMemory(CPU)
    starts = [memory.keep(torch.ones(size << 20, dtype=torch.uint8)).data_ptr() for size in (64, 65, 64)]
    assert [start % (2 << 20) for start in starts] == [0, 0, 0]


def test_kept_tensors_do_not_overlap() -> None:
    memory = WeightMemory(CPU)
    kept = [memory.keep(torch.full((size,), size, dtype=torch.int32)) for size in range(1, 70)]
    assert all((tensor == size).all() for size, tensor in enumerate(kept, 1))


def is_mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if begin <= address < end:
            return True
    return False


def test_the_memory_outlives_its_maker_and_ends_with_its_tensors() -> None:
    kept = WeightMemory(CPU).keep(torch.ones(96 << 20, dtype=torch.uint8))
    gc.collect()
    assert kept.sum() == 96 << 20
    middle = kept.data_ptr() + (48 << 20)
    assert is_mapped(middle)
    del kept
    gc.collect()
    assert not is_mapped(middle)


@pytest.mark.parametrize("weights", ["full", "int8"])
def test_a_loaded_model_leaves_nothing_of_its_file_in_memory(weights: str) -> None:
    model = load(weights)
    gc.collect()
    assert resident(bundled_path("target") / "model.safetensors") == 0
    for tensor in weights_of(model):
        assert tensor.isfinite().all()


def test_a_tied_head_is_the_embedding() -> None:
    """Once in memory, in whole numbers; an int8 head is no embedding."""
    full, rounded = load(), load("int8")
    assert full.config.tied
    assert full.weights.embedding is None
    assert rounded.weights.embedding is not None
    ids = torch.tensor([0, 1, 47, 48, 4095, 17, 17])
    assert torch.equal(full.embed(ids), rounded.embed(ids))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_what_was_freed_between_pieces_that_are_held_goes_back_to_the_system() -> None:
    pieces = [bytearray(5000) for _ in range(20_000)]
    held = pieces[::500]
    del pieces
    before = anonymous()
    return_freed()
    assert before - anonymous() > 50e6
    assert len(held) == 40


def anonymous() -> int:
    """Bytes that this process holds and no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

"""Triton's attention where a block gets little shared memory: what it takes by the compiler, and what is planned."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pearl_kernels.report.triton_jobs import TritonProcess
from pearl_kernels.triton import attention
from pearl_kernels.triton.attention_plan import FEWEST_STAGES, Tile, plan_tile, shared_bytes

KIB = 1024
SMALL = 99 * KIB  # of a block on sm_86, sm_89 and sm_120
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDTHS = (64, 80, 128, 256)


@pytest.fixture(scope="module")
def compiler() -> Iterator[TritonProcess]:
    with TritonProcess() as process:
        yield process


# Of each architecture what takes most of it; all others are smaller tiles of the same kernel.
@pytest.mark.parametrize(
    ("arch", "name"),
    [
        (86, "attend-bf16-d128-m64-split"),
        (86, "attend-bf16-d128-m128-prompt"),
        (89, "attend-fp32-d128-m16-split"),
        (120, "attend-bf16-d128-m128-prompt"),
        (120, "attend-bf16-d256-m32-split"),
    ],
)
def test_what_is_planned_for_small_gpus_is_no_less_than_the_compiler_says(
    compiler: TritonProcess, arch: int, name: str
) -> None:
    (variant,) = (variant for variant in attention.VARIANTS if variant.name == name)
    match = re.search(r"-(\w+)-d(\d+)-m(\d+)", name)
    assert match is not None
    dtype, width, rows = TYPES[match[1]], int(match[2]), int(match[3])
    tile = plan_tile("prompt" in name, width, dtype, SMALL)
    assert (tile.block_m, tile.num_stages, tile.num_warps) == (rows, variant.num_stages, variant.num_warps)
    answer: dict[str, Any] = compiler.ask({"module": attention.__name__, "variant": name, "arch": arch})
    assert "error" not in answer, answer
    taken = answer["dynamic_shared"] + answer["static_shared"]
    assert 0 < taken <= shared_bytes(tile, width, dtype) <= SMALL


@pytest.mark.parametrize("limit", [64, 99, 163, 227])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_tile_fits_the_gpu_that_it_is_planned_for(limit: int, dtype: torch.dtype) -> None:
    for width in WIDTHS:
        for prompts in (False, True):
            if limit == 64 and width == 256 and dtype is torch.float32:
                continue
            tile = plan_tile(prompts, width, dtype, limit * KIB)
            assert shared_bytes(tile, width, dtype) <= limit * KIB
            largest = plan_tile(prompts, width, dtype, 227 * KIB)
            assert (tile.block_m, tile.block_n) == (largest.block_m, largest.block_n), (
                "bits do not hang on the GPU's size"
            )
            assert tile.num_stages == (FEWEST_STAGES if limit < 99 else largest.num_stages) or width == 64


def test_what_fits_no_stage_is_refused_with_the_sizes() -> None:
    with pytest.raises(RuntimeError, match=r"needs 82 KiB .* heads of 256 in float32, this GPU has 64"):
        plan_tile(False, 256, torch.float32, 64 * KIB)


def test_the_tensors_own_device_is_asked_for_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {0: 227, 1: 64}

    def get_device_properties(index: int) -> dict[str, int]:
        return {"multiprocessor_count": 84, "max_shared_mem": found[index] * KIB}

    utils = SimpleNamespace(get_device_properties=get_device_properties)
    monkeypatch.setattr(attention, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    gpu = attention._gpu(torch.device("cuda", 1))
    assert (gpu.cores, gpu.shared) == (84, 64 * KIB)
    assert plan_tile(False, 128, torch.bfloat16, gpu.shared) == Tile(64, 64, num_warps=4, num_stages=2)

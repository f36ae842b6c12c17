"""The CUDA kernels move 16 bytes at once where they can: any address, stride and width must give the same result."""

from __future__ import annotations

import pytest
import torch
from cuda_emu import build
from ops_support import assert_rounds_to
from torch import Tensor

from pearl_kernels import reference

pytestmark = build.on_linux

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16", "fp16"))
OFFSETS = (0, 1, 4, 8)  # elements past a multiple of 16 bytes


def at_offset(values: Tensor, offset: int, gap: int = 0) -> Tensor:
    """The values as rows that begin ``offset`` elements after an aligned address and lie ``gap`` elements apart."""
    n, flat = values.shape[0], values.flatten(1)
    width = flat.shape[1] + gap
    memory = torch.full((offset + n * width,), torch.nan, dtype=values.dtype)
    assert memory.data_ptr() % 16 == 0
    rows = memory[offset:].view(n, width)[:, : flat.shape[1]]
    rows.copy_(flat)
    return rows.unflatten(1, values.shape[1:])


@every_dtype
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("width", "gap"), [(64, 0), (64, 3), (64, 16), (61, 0)])
def test_norms(offset: int, width: int, gap: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(2, 3, width) * 3).to(dtype)
    weight = at_offset(torch.randn(1, width).to(dtype), offset)[0]
    exact = reference.rms_norm(x.float(), weight.float(), 1e-5)
    assert_rounds_to(build.operator("rms_norm")(at_offset(x, offset, gap), weight, 1e-5), exact)
    total = at_offset(residual, offset, gap)
    normed = build.operator("add_rms_norm")(at_offset(x, offset, gap), total, weight, 1e-5)
    expected = (residual.float() + x.float()).to(dtype)
    assert torch.equal(total, expected)
    assert_rounds_to(normed, reference.rms_norm(expected.float(), weight.float(), 1e-5))


@pytest.mark.parametrize("width", [8192, 8196, 9000])  # one thread block's registers hold 8192 of fp32
def test_norms_of_rows_longer_than_registers(width: int) -> None:
    x, residual, weight = torch.randn(1, width), torch.randn(1, width), torch.randn(width)
    expected = residual + x
    normed = build.operator("add_rms_norm")(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected)
    assert_rounds_to(normed, reference.rms_norm(expected, weight, 1e-5))


@every_dtype
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("width", "gap"), [(64, 0), (64, 3), (61, 0), (61, 6)])
def test_activation(offset: int, width: int, gap: int, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 2 * width) * 3).to(dtype)
    made = build.operator("silu_and_mul")(at_offset(x, offset, gap))
    assert_rounds_to(made, reference.silu_and_mul(x.float()))


def test_activation_of_rows_longer_than_a_block() -> None:
    x = torch.randn(2, 2 * 2100)
    assert_rounds_to(build.operator("silu_and_mul")(x), reference.silu_and_mul(x))


@every_dtype
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("width", "gap"), [(64, 0), (64, 3), (61, 6), (2100, 0)])
def test_scaling(offset: int, width: int, gap: int, dtype: torch.dtype) -> None:
    x = (torch.randn(3, width) * 3).to(dtype)
    exact, placed = x.float().clone(), at_offset(x, offset, gap)
    reference.scale_and_cap(exact, 2.0, 3.0)
    build.operator("scale_and_cap")(placed, 2.0, 3.0)
    assert_rounds_to(placed, exact)


@every_dtype
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("gap", [0, 3, 8])
@pytest.mark.parametrize("head_dim", [8, 72, 136])  # groups of 8, 16 and 32 lanes, none of them full
def test_rope(offset: int, gap: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(3, heads, head_dim).to(dtype) for heads in (3, 1, 1))
    cos_sin, positions = torch.randn(9, head_dim), torch.tensor([8, 0, 4])
    slots, norms = torch.tensor([5, -1, 0]), torch.randn(2, head_dim).to(dtype)
    expected_q, moved_q = q.clone(), at_offset(q, offset, gap)
    expected = torch.full((2, 3, 2, 1, head_dim), 7.0, dtype=dtype)
    caches = at_offset(expected.flatten(1), offset).view(expected.shape)
    reference.rope_and_cache(expected_q, k, v, positions, cos_sin, *expected, slots, *norms)
    moved = (at_offset(k, offset, gap), at_offset(v, offset, gap), positions, cos_sin)
    build.operator("rope_and_cache")(moved_q, *moved, *caches, slots, *norms)
    # The norm is rounded before the rotation; a sum in another order moves some of its results by a unit.
    unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(moved_q, expected_q, rtol=unit, atol=4 * unit)
    torch.testing.assert_close(caches[0], expected[0], rtol=unit, atol=4 * unit)
    assert torch.equal(caches[1], expected[1])

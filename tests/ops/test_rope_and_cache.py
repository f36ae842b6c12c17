"""rope_and_cache."""

from __future__ import annotations

import pytest
import torch
from ops_support import Implementation, assert_rounds_to, both_dtypes, implementations, strided_rows
from torch import Tensor

from pearl_kernels import reference

PAGES, PAGE_SIZE, POSITIONS = 7, 16, 300


def cos_sin_table(head_dim: int) -> Tensor:
    angles = torch.arange(POSITIONS)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("rope", implementations("rope_and_cache"))
@pytest.mark.parametrize("head_dim", [8, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize(("n", "query_heads", "kv_heads"), [(0, 2, 1), (1, 3, 3), (9, 8, 2)])
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "qk-norm"])
@both_dtypes
def test_rope_and_cache_matches_reference(
    rope: Implementation, head_dim: int, n: int, query_heads: int, kv_heads: int, with_norm: bool, dtype: torch.dtype
) -> None:
    merged = torch.randn(n, query_heads + 2 * kv_heads, head_dim).to(dtype)
    norms = [torch.randn(head_dim).to(dtype) for _ in range(2)] if with_norm else [None, None]
    positions, slots = torch.randint(0, POSITIONS, (n,)), torch.randperm(PAGES * PAGE_SIZE)[:n]
    slots[1::3] = -1  # padding rows
    results = []
    for run in (rope, reference.rope_and_cache):
        q, k, v = merged.clone().split((query_heads, kv_heads, kv_heads), dim=1)  # rows lie apart
        caches = torch.full((2, PAGES, PAGE_SIZE, kv_heads, head_dim), 7.0, dtype=dtype)
        run(q, k, v, positions, cos_sin_table(head_dim), caches[0], caches[1], slots, *norms, 1e-6)
        assert torch.equal(k, merged[:, query_heads:-kv_heads])
        results.append((q, *caches))
    (q, k_cache, v_cache), (q_expected, k_expected, v_expected) = results
    assert torch.equal(v_cache, v_expected)
    # Where the norm's own rounding falls the other way, one unit of an input moves two products.
    unit = 0.0 if dtype == torch.float32 else 2.0**-7 * (4 if with_norm else 1)
    for ours, expected in ((q, q_expected), (k_cache, k_expected)):
        torch.testing.assert_close(ours.float(), expected.float(), rtol=unit + 1e-5, atol=unit + 1e-5)


@pytest.mark.parametrize("rope", implementations("rope_and_cache"))
def test_bf16_is_rounded_once(rope: Implementation) -> None:
    q, k, v = (strided_rows(torch.randn(6, 2, 64).bfloat16()) for _ in range(3))
    positions, slots, table = torch.arange(6) * 31, torch.arange(6), cos_sin_table(64)
    exact_q, exact_k = q.float().contiguous(), torch.zeros(1, 16, 2, 64)
    reference.rope_and_cache(exact_q, k.float(), v.float(), positions, table, exact_k, torch.zeros_like(exact_k), slots)
    k_cache, v_cache = torch.zeros(2, 1, 16, 2, 64, dtype=torch.bfloat16)
    rope(q, k, v, positions, table, k_cache, v_cache, slots)
    assert_rounds_to(q, exact_q)
    assert_rounds_to(k_cache, exact_k)


@pytest.mark.parametrize("rope", [p for p in implementations("rope_and_cache") if p.id == "cpu-cpu"])
def test_any_number_is_rounded_to_bf16_as_torch_does(rope: Implementation) -> None:
    """Ties, subnormal numbers, infinities and NaN, alone and among others: one times a cosine which is that number."""
    bits = torch.randint(-(2**31), 2**31, (POSITIONS, 32), dtype=torch.int32)
    bits[::3] &= -0x7F810000 | 0x18000  # subnormal, and many ties
    bits[1::3, ::2] |= 0x7F800000  # infinite or NaN
    bits[2::3] = bits[2::3] & -0x7F008000 | 0x20000000  # normal, and many ties
    numbers = bits.view(torch.float32)
    table = torch.cat((numbers, torch.zeros_like(numbers)), dim=-1)
    q, k, v = torch.zeros(3, POSITIONS, 1, 64, dtype=torch.bfloat16)
    q[:, 0, :32] = 1
    caches = torch.zeros(2, 19, PAGE_SIZE, 1, 64, dtype=torch.bfloat16)
    rope(q, k, v, torch.arange(POSITIONS), table, *caches, torch.arange(POSITIONS))
    rounded, expected = q[:, 0, :32].contiguous(), numbers.bfloat16()
    assert torch.equal(rounded.isnan(), expected.isnan())
    assert torch.equal(rounded.nan_to_num(0).view(torch.int16), expected.nan_to_num(0).view(torch.int16))
    assert set(rounded[rounded.isnan()].view(torch.int16).tolist()) == {0x7FC0}


def test_reference_rotates_pairs_as_complex_numbers() -> None:
    n, head_dim = 5, 16
    q, k, v = (torch.randn(n, 2, head_dim) for _ in range(3))
    positions, slots, table = torch.arange(n) + 3, torch.tensor([4, 0, -1, 2, 9]), cos_sin_table(head_dim)
    rotation = torch.complex(table[positions, : head_dim // 2], table[positions, head_dim // 2 :])[:, None]

    def rotated(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : head_dim // 2], x[..., head_dim // 2 :]) * rotation
        return torch.cat((turned.real, turned.imag), dim=-1)

    expected_q, expected_k = rotated(q), rotated(k)
    k_cache, v_cache = torch.zeros(2, 3, 4, 2, head_dim)
    reference.rope_and_cache(q, k, v, positions, table, k_cache, v_cache, slots)
    torch.testing.assert_close(q, expected_q)
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            torch.testing.assert_close(k_cache[slot // 4, slot % 4], expected_k[row])
            torch.testing.assert_close(v_cache[slot // 4, slot % 4], v[row])
    assert (k_cache.flatten(0, 1).abs().sum((1, 2)) > 0).sum() == 4

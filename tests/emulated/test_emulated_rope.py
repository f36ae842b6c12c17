"""rope_and_cache of the GPU providers, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_support import Implementation, assert_rounds_to, emulated, strided_rows
from torch import Tensor

from pearl_kernels import cpu, reference

PAGES, PAGE_SIZE, POSITIONS = 3, 8, 300
UNITS = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

every_dtype = pytest.mark.parametrize("dtype", UNITS, ids=("fp32", "bf16", "fp16"))


def cos_sin_table(head_dim: int) -> Tensor:
    angles = torch.arange(POSITIONS)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


@pytest.mark.parametrize("rope", emulated("rope_and_cache"))
@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 256])
@pytest.mark.parametrize(("n", "query_heads", "kv_heads"), [(0, 2, 1), (1, 3, 3), (5, 10, 5)])
@pytest.mark.parametrize("normed", ["plain", "q-norm", "qk-norm"])
@every_dtype
def test_rope_and_cache_matches_reference(
    rope: Implementation, head_dim: int, n: int, query_heads: int, kv_heads: int, normed: str, dtype: torch.dtype
) -> None:
    merged = strided_rows(torch.randn(n, query_heads + 2 * kv_heads, head_dim).to(dtype))
    weights = torch.randn(2, head_dim).to(dtype)
    norms = {"q_norm": weights[0] if "q" in normed else None, "k_norm": weights[1] if "k" in normed else None}
    positions, slots = torch.randint(0, POSITIONS, (n,)), torch.randperm(PAGES * PAGE_SIZE)[:n]
    slots[1::3] = -1  # padding rows
    merged[1::3, query_heads:] = torch.nan
    results = []
    for run in (rope, reference.rope_and_cache):
        q, k, v = strided_rows(merged).split((query_heads, kv_heads, kv_heads), dim=1)  # rows lie apart
        caches = torch.full((2, PAGES, PAGE_SIZE, kv_heads, head_dim), 7.0, dtype=dtype)
        run(q, k, v, positions, cos_sin_table(head_dim), caches[0], caches[1], slots, **norms, eps=1e-6)
        exactly(k, merged[:, query_heads:-kv_heads])
        exactly(v, merged[:, -kv_heads:])
        results.append((q, *caches))
    (q, k_cache, v_cache), (q_expected, k_expected, v_expected) = results
    assert torch.equal(v_cache, v_expected)
    # Where the norm's own rounding falls the other way, one unit of an input moves two products.
    unit = UNITS[dtype] * (1 if normed == "plain" else 4)
    for ours, expected in ((q, q_expected), (k_cache, k_expected)):
        torch.testing.assert_close(ours.float(), expected.float(), rtol=unit + 1e-5, atol=unit + 1e-5)


def exactly(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rope", emulated("rope_and_cache"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=("bf16", "fp16"))
def test_results_are_rounded_once(rope: Implementation, dtype: torch.dtype) -> None:
    q, k, v = (strided_rows(torch.randn(6, 2, 64).to(dtype)) for _ in range(3))
    positions, slots, table = torch.arange(6) * 31, torch.arange(6), cos_sin_table(64)
    exact_q, exact_k = q.float().contiguous(), torch.zeros(1, 16, 2, 64)
    reference.rope_and_cache(exact_q, k.float(), v.float(), positions, table, exact_k, torch.zeros_like(exact_k), slots)
    k_cache, v_cache = torch.zeros(2, 1, 16, 2, 64, dtype=dtype)
    rope(q, k, v, positions, table, k_cache, v_cache, slots)
    ulps = UNITS[dtype] / 2 / 2.0**-7
    assert_rounds_to(q, exact_q, ulps)
    assert_rounds_to(k_cache, exact_k, ulps)


@pytest.mark.parametrize("rope", emulated("rope_and_cache"))
def test_the_norm_is_rounded_before_the_rotation(rope: Implementation) -> None:
    """With a cosine and a sine of one, the difference of two nearly equal halves is what their rounding left."""
    half = torch.rand(3, 2, 32) + 1
    x = torch.cat((half, half * (1 + torch.rand(3, 2, 32) / 16)), dim=-1).bfloat16()
    weight, table = torch.ones(64, dtype=torch.bfloat16), torch.ones(1, 64)
    positions, slots = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    results = []
    for run in (rope, reference.rope_and_cache):
        q, caches = x.clone(), torch.zeros(2, 1, 4, 2, 64).bfloat16()
        run(q, x, x, positions, table, *caches, slots, weight, weight)
        results.append(torch.cat((q, caches[0, 0, :3])))
    ours, expected = results
    assert (ours == expected).float().mean() > 0.98  # a near tie may fall the other way


@pytest.mark.parametrize("rope", emulated("rope_and_cache"))
def test_a_row_does_not_depend_on_its_batch(rope: Implementation) -> None:
    q, k, v = (torch.randn(3, 2, 64).bfloat16() for _ in range(3))
    positions, slots, weight = torch.tensor([5, 0, 299]), torch.tensor([3, 9, 0]), torch.randn(64).bfloat16()
    caches = torch.zeros(2, 2, PAGES, PAGE_SIZE, 2, 64, dtype=torch.bfloat16)
    together, alone = q.clone(), q.clone()
    rope(together, k, v, positions, cos_sin_table(64), *caches[0], slots, weight, weight)
    for row in range(3):
        one = slice(row, row + 1)
        rope(alone[one], k[one], v[one], positions[one], cos_sin_table(64), *caches[1], slots[one], weight, weight)
    assert torch.equal(alone, together)
    assert torch.equal(caches[1], caches[0])


def good_call() -> dict[str, Any]:
    return {
        "q": torch.zeros(2, 4, 16),
        "k": torch.zeros(2, 2, 16),
        "v": torch.zeros(2, 2, 16),
        "positions": torch.zeros(2, dtype=torch.int64),
        "cos_sin": torch.zeros(8, 16),
        "k_cache": torch.zeros(2, 4, 2, 16),
        "v_cache": torch.zeros(2, 4, 2, 16),
        "slot_mapping": torch.zeros(2, dtype=torch.int64),
    }


BAD_ARGUMENTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "q-rank": lambda: {"q": torch.zeros(2, 64)},
    "head-dim": lambda: {"q": torch.zeros(2, 4, 12)},
    "cache-rank": lambda: {"k_cache": torch.zeros(8, 2, 16)},
    "k-heads": lambda: {"k": torch.zeros(2, 3, 16)},
    "v-dtype": lambda: {"v": torch.zeros(2, 2, 16).bfloat16()},
    "heads-apart": lambda: {"q": torch.zeros(2, 8, 16)[:, ::2]},
    "position-dtype": lambda: {"positions": torch.zeros(2, dtype=torch.int32)},
    "table-width": lambda: {"cos_sin": torch.zeros(8, 32)},
    "cache-layout": lambda: {"k_cache": torch.zeros(2, 2, 4, 16).transpose(1, 2)},
    "v-cache": lambda: {"v_cache": torch.zeros(2, 4, 1, 16)},
    "slots": lambda: {"slot_mapping": torch.zeros(3, dtype=torch.int64)},
    "q-norm": lambda: {"q_norm": torch.zeros(8)},
    "k-norm": lambda: {"k_norm": torch.zeros(16).bfloat16()},
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused_in_the_words_of_the_cpu_provider(case: str) -> None:
    arguments = {**good_call(), **BAD_ARGUMENTS[case]()}
    with pytest.raises(ValueError, match="rope_and_cache") as expected:
        cpu.OPERATORS["rope_and_cache"](**arguments)
    for provider in emulated("rope_and_cache"):
        with pytest.raises(ValueError, match="rope_and_cache") as refused:
            provider.values[0](**arguments)
        assert str(refused.value) == str(expected.value)


def test_the_call_that_the_bad_ones_are_made_of_is_good() -> None:
    for provider in emulated("rope_and_cache"):
        provider.values[0](**good_call())

"""sample of the GPU providers, on CPU tensors. Draws that equal the reference's have its distribution."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops_support import (
    Implementation,
    decided,
    emulated,
    interpreted,
    mixed_sampling,
    padded_logits,
    reference_result,
    sampling,
    strided_rows,
)
from sample_support import check, one_row_for_each

from pearl_kernels.reference import Stream
from pearl_kernels.triton.launch import Plan, make_plan
from pearl_kernels.triton.sampling import draw

providers = pytest.mark.parametrize("sample", emulated("sample"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
LARGE = 4301  # logits: more than one program has, more than a program takes at once
CUTS: dict[str, dict[str, Any]] = {
    "uncut": {},
    "top-k": {"top_k": 40},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.02},
    "top-k and top-p": {"top_k": 60, "top_p": 0.9},
    "all": {"temperature": 0.8, "top_k": 70, "top_p": 0.95, "min_p": 0.01},
    "hot": {"temperature": 2.5, "top_p": 0.9},
    "cold": {"temperature": 0.05, "top_k": 30, "min_p": 1e-6},
    "greedy": {"temperature": 0.0},
}


@pytest.fixture(autouse=True)
def same_inputs_always() -> None:
    torch.manual_seed(17)


@providers
@pytest.mark.parametrize("vocab_size", [1, 2, 17, 255, 1031])
@every_dtype
def test_mixed_rows_match_reference(sample: Implementation, vocab_size: int, dtype: torch.dtype) -> None:
    logits = padded_logits(6, vocab_size, vocab_size + 9, dtype, torch.nan)
    check(sample, strided_rows(logits), mixed_sampling(6), vocab_size)


@providers
@every_dtype
def test_rows_of_several_tiles_match_reference(sample: Implementation, dtype: torch.dtype) -> None:
    logits = padded_logits(len(CUTS), LARGE, LARGE + 11, dtype, torch.inf)
    check(sample, logits, one_row_for_each(list(CUTS.values())), LARGE)


@providers
@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_the_cutoff_is_exact_however_logits_are_scaled(sample: Implementation, scale: float) -> None:
    settings = (1, 1.0), (7, 0.5), (998, 3.0), (999, 1.0), (2000, 1.0)
    cuts = [{"top_k": k, "temperature": temperature * scale} for k, temperature in settings]
    logits = padded_logits(len(cuts), 999, 999, torch.float32, 0.0) * scale
    check(sample, logits, one_row_for_each(cuts), 999)


@providers
def test_all_logits_in_one_bin(sample: Implementation) -> None:
    """More candidates for the cutoff than are collected; every one of them differs."""
    cuts = [{"top_k": 4000}, {"top_p": 0.5}, {"top_k": 4200, "top_p": 0.7}, {"min_p": 0.9999}]
    logits = padded_logits(len(cuts), LARGE, LARGE, torch.float32, 0.0) * 1e-4
    check(sample, logits, one_row_for_each(cuts), LARGE)


@providers
@every_dtype
def test_ties_match_reference(sample: Implementation, dtype: torch.dtype) -> None:
    """Few distinct values, so that each cutoff falls into a tie."""
    check(sample, padded_logits(10, 300, 304, dtype, torch.nan).round(), mixed_sampling(10), 300)


@providers
@every_dtype
def test_excluded_logits_match_reference(sample: Implementation, dtype: torch.dtype) -> None:
    logits = padded_logits(12, 300, 304, dtype, torch.inf)
    logits[torch.rand_like(logits, dtype=torch.float32) < 0.9] = -torch.inf
    logits[6:][logits[6:] < 0] = -3e4  # excluded for all purposes
    logits[:, 299] = 1.0  # no row is empty
    check(sample, logits, mixed_sampling(12), 300)


@providers
@pytest.mark.parametrize("stream", list(Stream))
def test_streams_seeds_and_positions_match_reference(sample: Implementation, stream: Stream) -> None:
    """Flat logits: the noise alone decides."""
    seeds = torch.tensor([0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)]).repeat(2)
    params = sampling(16)
    params.seed.copy_(seeds)
    positions = torch.tensor([0, 1, 2, 1000, 2**16, 2**31 - 1, 2**31, 2**32 - 1])
    positions = torch.cat((positions, positions.flip(0)))
    logits = torch.zeros(16, 999)
    tokens = sample(logits, params, positions, 999, stream).tokens
    clear = decided(logits, params, positions, 999, stream)
    expected = reference_result("sample", logits, params, positions, 999, stream).tokens
    assert torch.equal(tokens[clear], expected[clear])
    assert tokens.unique().numel() >= 15  # each seed and position draws for itself


@providers
@every_dtype
def test_greedy_takes_the_first_largest_logit(sample: Implementation, dtype: torch.dtype) -> None:
    n = 4
    logits = padded_logits(n, LARGE, LARGE + 3, dtype, torch.inf).clamp(max=4)
    first = torch.tensor([0, 5, 2100, 4100])
    for row, token in enumerate(first.tolist()):
        logits[row, :token] = logits[row, :token].clamp(max=3.5)
        logits[row, token] = 4
        logits[row, LARGE - 1] = 4  # as large, but later
    tokens, logprobs, _ = sample(logits, sampling(n, 0.0, top_k=5, top_p=0.3, min_p=0.5), torch.arange(n), LARGE)
    assert torch.equal(tokens, first)
    assert torch.equal(logprobs, torch.zeros(n))


@providers
@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.7}, {"min_p": 0.3}])
def test_what_ties_with_the_cutoff_stays(sample: Implementation, cut: dict[str, Any]) -> None:
    row = torch.tensor([2.0, 1.0, 3.0, 2.0, 2.0, 1.0, 0.0], dtype=torch.bfloat16)
    tokens, logprobs, _ = sample(row.repeat(6, 1), sampling(6, **cut), torch.arange(6), 7)
    kept = row.double().masked_fill(row < 2, -torch.inf).log_softmax(-1)
    torch.testing.assert_close(logprobs, kept[tokens].float())


@providers
@pytest.mark.parametrize("value", [-1e4, 30.0])
@pytest.mark.parametrize("vocab_size", [20, LARGE])
def test_equal_logits_are_one_tie(sample: Implementation, value: float, vocab_size: int) -> None:
    cuts = [{}, {"top_k": 3}, {"top_p": 0.2}, {"min_p": 1.0}, {"top_k": 1, "top_p": 0.01}]
    logprobs = sample(torch.full((5, vocab_size), value), one_row_for_each(cuts), torch.arange(5), vocab_size).logprobs
    torch.testing.assert_close(logprobs, torch.full((5,), -math.log(vocab_size)))


@providers
def test_infinitely_small_logits_are_never_drawn(sample: Implementation) -> None:
    cuts = [{}, {"top_k": 3}, {"top_p": 0.2}, {"min_p": 0.1}, {"top_k": 2, "top_p": 0.5}, {"temperature": 0.0}]
    logits = torch.full((len(cuts), LARGE), -torch.inf)
    only = torch.tensor([0, 7, 2047, 2048, 4200, LARGE - 1])
    logits[torch.arange(len(cuts)), only] = torch.tensor([1.0, -60.0, 0.0, 7.5, 90.0, -1.0])
    tokens, logprobs, _ = sample(logits, one_row_for_each(cuts), torch.arange(len(cuts)), LARGE)
    assert torch.equal(tokens, only)
    torch.testing.assert_close(logprobs, torch.zeros(len(cuts)))


@providers
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 9, dtype=torch.float64)}, "float32 or bfloat16 or float16"),
        ({"logits": torch.zeros(2, 18)[:, ::2]}, "each row of logits must be contiguous"),
        ({"logits": torch.zeros(18)}, "at least 9"),
        ({"vocab_size": 10}, "at least 10"),
        ({"vocab_size": 0}, "at least 0"),
        ({"params": sampling(3)}, "temperature must be contiguous"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, "positions must be contiguous"),
    ],
)
def test_bad_input_is_refused(sample: Implementation, change: dict[str, Any], message: str) -> None:
    good = {"logits": torch.zeros(2, 9), "params": sampling(2), "positions": torch.arange(2), "vocab_size": 9}
    sample(**good)
    with pytest.raises(ValueError, match=message):
        sample(**(good | change))


@interpreted
def test_triton_draws_the_same_however_programs_share_the_tiles() -> None:
    params, logits = one_row_for_each(list(CUTS.values())), padded_logits(len(CUTS), LARGE, LARGE, torch.float32, 0.0)
    results = []
    for tiles_per_program in (1, 2):
        drawn = draw(Plan(len(CUTS), LARGE, tiles_per_program), logits, params, torch.arange(len(CUTS)))
        results.append((drawn.tokens, drawn.logprobs))
    for tokens, logprobs in results[1:]:
        assert torch.equal(tokens, results[0][0])
        assert torch.equal(logprobs, results[0][1])


def test_triton_plans_fill_the_device_and_cover_the_row() -> None:
    for vocab_size in (1, 2048, 2049, 32000, 128256, 262144):
        for slots in (1, 7, 64, 320, 5000):
            plan = make_plan(slots, vocab_size)
            programs = plan.grid[1]
            assert plan.grid[0] == slots
            assert (programs - 1) * plan.tiles_per_program < plan.tiles <= programs * plan.tiles_per_program
            assert plan.tiles <= plan.span < 2 * plan.tiles
            assert plan.tiles_per_program == 1 or slots * (programs + 1) > 1056
            assert 2 ** (plan.mass_bits + 1) * vocab_size <= 2**63

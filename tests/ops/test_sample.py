"""sample: the same token and log-probability from every provider, and the right distribution from all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_support import (
    Implementation,
    assert_frequencies,
    both_dtypes,
    decided,
    emulated,
    implementations,
    mixed_sampling,
    padded_logits,
    sampling,
    strided_rows,
)
from sample_support import check, one_row_for_each
from torch import Tensor

from pearl_kernels import reference
from pearl_kernels.cpu import OPERATORS as CPU
from pearl_kernels.reference import Stream
from pearl_kernels.reference.sampling import log_probabilities

providers = pytest.mark.parametrize("sample", implementations("sample"))
everyone = pytest.mark.parametrize("sample", implementations("sample", with_reference=True))
emulated_too = pytest.mark.parametrize("sample", implementations("sample", with_reference=True) + emulated("sample"))
CUTS = [
    pytest.param({}, id="uncut"),
    pytest.param({"temperature": 0.6, "top_k": 3}, id="top-k"),
    pytest.param({"temperature": 1.4, "top_p": 0.8}, id="top-p"),
    pytest.param({"min_p": 0.2}, id="min-p"),
    pytest.param({"temperature": 0.9, "top_k": 6, "top_p": 0.9, "min_p": 0.05}, id="all"),
]
PEAKED = torch.tensor([1.5, -0.5, 2.0, 0.3, 0.3, -2.0, 1.1, -6.0, 0.3, 0.9, -0.2])


@pytest.fixture(autouse=True)
def same_inputs_always() -> None:
    torch.manual_seed(11)


def repeated(row: Tensor, n: int) -> Tensor:
    return row.repeat(n, 1)


@providers
@pytest.mark.parametrize("vocab_size", [1, 2, 3, 16, 17, 64, 255, 1031, 5003])
@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
@both_dtypes
def test_mixed_rows_match_reference(sample: Implementation, vocab_size: int, poison: float, dtype: torch.dtype) -> None:
    n = 40
    logits = padded_logits(n, vocab_size, vocab_size + 9, dtype, poison)
    check(sample, logits, mixed_sampling(n), vocab_size)
    check(sample, strided_rows(logits), mixed_sampling(n), vocab_size)
    check(sample, logits[:, :vocab_size].contiguous(), mixed_sampling(n), vocab_size)


@providers
@both_dtypes
def test_ties_match_reference(sample: Implementation, dtype: torch.dtype) -> None:
    """Few distinct values, so that each cut-off falls into a tie."""
    logits = padded_logits(40, 300, 304, dtype, torch.nan).round()
    check(sample, logits, mixed_sampling(40), 300)


@providers
@both_dtypes
def test_excluded_logits_match_reference(sample: Implementation, dtype: torch.dtype) -> None:
    logits = padded_logits(40, 300, 304, dtype, torch.inf)
    logits[torch.rand_like(logits, dtype=torch.float32) < 0.9] = -torch.inf
    logits[:, 299] = 1.0  # no row is empty
    check(sample, logits, mixed_sampling(40), 300)


@providers
@pytest.mark.parametrize("stream", list(Stream))
def test_streams_seeds_and_positions_match_reference(sample: Implementation, stream: Stream) -> None:
    """Flat logits: the noise alone decides."""
    edges = [0, 1, -1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -(2**63)]
    params = sampling(len(edges) ** 2)
    params.seed.copy_(torch.tensor(edges).repeat_interleave(len(edges)))
    positions = torch.tensor([0, 1, 2, 1000, 2**16, 2**31 - 1, 2**31, 2**32 - 1]).repeat(len(edges))
    logits = torch.zeros(len(positions), 999)
    tokens = sample(logits, params, positions, 999, stream).tokens
    clear = decided(logits, params, positions, 999, stream)
    assert torch.equal(tokens[clear], reference.sample(logits, params, positions, 999, stream).tokens[clear])
    assert tokens.unique().numel() > len(tokens) * 0.85  # each seed and position draws for itself


@everyone
def test_streams_draw_independently(sample: Implementation) -> None:
    drawn = [sample(torch.zeros(50, 1000), sampling(50), torch.arange(50), 1000, stream).tokens for stream in Stream]
    for i in range(len(drawn)):
        for j in range(i):
            assert (drawn[i] == drawn[j]).sum() <= 2


@everyone
@both_dtypes
def test_greedy_takes_the_first_largest_logit(sample: Implementation, dtype: torch.dtype) -> None:
    n, vocab_size = 30, 200
    logits = padded_logits(n, vocab_size, 208, dtype, torch.inf).clamp(max=4)
    first = torch.randint(0, vocab_size - 1, (n,))
    for row, token in enumerate(first.tolist()):
        logits[row, :token] = logits[row, :token].clamp(max=3.5)
        logits[row, token] = 4
        logits[row, vocab_size - 1] = 4  # as large, but later
    tokens, logprobs, _ = sample(logits, sampling(n, 0.0, top_k=5, top_p=0.3, min_p=0.5), torch.arange(n), vocab_size)
    assert torch.equal(tokens, first)
    assert torch.equal(logprobs, torch.zeros(n))


@everyone
@pytest.mark.parametrize("cut", [{"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.7}, {"min_p": 0.3}])
@both_dtypes
def test_what_ties_with_the_cut_off_stays(sample: Implementation, cut: dict[str, Any], dtype: torch.dtype) -> None:
    row = torch.tensor([2.0, 1.0, 3.0, 2.0, 2.0, 1.0, 0.0], dtype=dtype)
    tokens, logprobs, _ = sample(repeated(row, 1000), sampling(1000, **cut), torch.arange(1000), 7)
    kept, counts = tokens.unique(return_counts=True)
    assert kept.tolist() == [0, 2, 3, 4]
    exact = row.double().masked_fill(row < 2, -torch.inf).log_softmax(-1)
    assert_frequencies(counts, exact[kept].exp() * 1000)
    torch.testing.assert_close(logprobs, exact[tokens].float())


@everyone
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.2}, {"min_p": 1.0}, {"top_k": 1, "top_p": 0.01}])
@pytest.mark.parametrize("value", [0.0, -1e4, 30.0])
def test_equal_logits_are_one_tie(sample: Implementation, cut: dict[str, Any], value: float) -> None:
    tokens, logprobs, _ = sample(torch.full((400, 20), value), sampling(400, **cut), torch.arange(400), 20)
    assert tokens.unique().numel() == 20
    torch.testing.assert_close(logprobs, torch.full((400,), -math.log(20)))


@everyone
@pytest.mark.parametrize("cut", [{}, {"top_k": 3}, {"top_p": 0.2}, {"min_p": 0.1}, {"temperature": 0.0}])
@both_dtypes
def test_infinitely_small_logits_are_never_drawn(
    sample: Implementation, cut: dict[str, Any], dtype: torch.dtype
) -> None:
    logits = torch.full((50, 100), -torch.inf, dtype=dtype)
    only = torch.arange(50) * 2
    logits[torch.arange(50), only] = torch.randn(50).to(dtype) * 50
    tokens, logprobs, _ = sample(logits, sampling(50, **cut), torch.arange(50), 100)
    assert torch.equal(tokens, only)
    torch.testing.assert_close(logprobs, torch.zeros(50))


@everyone
@both_dtypes
def test_large_logits_and_low_temperatures_do_not_overflow(sample: Implementation, dtype: torch.dtype) -> None:
    logits = (torch.randn(40, 100) * 1e4).to(dtype)
    params = sampling(40, temperature=0.01, top_p=0.9)
    tokens, logprobs, _ = sample(logits, params, torch.arange(40), 100)
    assert torch.equal(tokens, logits.float().argmax(-1))  # all but the largest are thousands of nats away
    torch.testing.assert_close(logprobs, torch.zeros(40))


@emulated_too
@pytest.mark.parametrize("vocab_size", [333, 2333])
@both_dtypes
def test_a_row_does_not_depend_on_its_batch(sample: Implementation, vocab_size: int, dtype: torch.dtype) -> None:
    n = 6 if sample.emulated else 12
    logits, params = padded_logits(n, vocab_size, vocab_size + 7, dtype, torch.nan), mixed_sampling(n)
    positions = torch.arange(n)
    together = sample(logits, params, positions, vocab_size)
    order = torch.randperm(n)
    shuffled = sample(logits[order], params[order], positions[order], vocab_size)
    assert all(torch.equal(a, b[order]) for a, b in zip(shuffled[:2], together[:2], strict=True))
    for row in range(n):
        one = torch.tensor([row])
        alone = sample(logits[one], params[one], positions[one], vocab_size)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone[:2], together[:2], strict=True))


@emulated_too
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_distribution_harms_nothing(sample: Implementation, value: float) -> None:
    cuts = [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9}]
    params = one_row_for_each([cut for cut in cuts for _ in range(2)])
    n, vocab_size = len(params.seed), 300
    logits, positions = padded_logits(n, vocab_size, vocab_size, torch.float32, 0.0), torch.arange(n)
    expected = reference.sample(logits, params, positions, vocab_size)
    logits[::2] = value
    tokens, logprobs, _ = sample(logits, params, positions, vocab_size)
    assert torch.equal(tokens[1::2], expected.tokens[1::2])
    torch.testing.assert_close(logprobs[1::2], expected.logprobs[1::2])
    assert torch.equal(tokens[::2], torch.zeros(n // 2, dtype=torch.int64))
    sampled = params.temperature[::2] > 0
    assert logprobs[::2][sampled].isnan().all()


@emulated_too
@pytest.mark.parametrize("cut", [{}, {"temperature": 0.0}, {"top_k": 9, "top_p": 0.9}])
def test_a_nan_is_no_token(sample: Implementation, cut: dict[str, Any]) -> None:
    n, vocab_size = 4 if sample.emulated else 40, 300
    logits, params = padded_logits(n, vocab_size, vocab_size, torch.float32, 0.0), sampling(n, **cut)
    sick = torch.rand(n, vocab_size) < 0.5
    sick[torch.arange(n), logits.argmax(-1)] = True
    check(sample, logits.masked_fill(sick, torch.nan), params, vocab_size)
    tokens, logprobs, _ = sample(logits.masked_fill(sick, torch.nan), params, torch.arange(n), vocab_size)
    expected = sample(logits.masked_fill(sick, -torch.inf), params, torch.arange(n), vocab_size)
    assert torch.equal(tokens, expected.tokens)
    torch.testing.assert_close(logprobs, expected.logprobs)


@emulated_too
def test_equal_logits_in_a_wider_dtype_draw_the_same(sample: Implementation) -> None:
    """A round whose penalties need fp32 rows must not change what its other requests get."""
    n, vocab_size = 5 if sample.emulated else 60, 300
    logits, params = padded_logits(n, vocab_size, vocab_size + 3, torch.bfloat16, torch.nan), mixed_sampling(n)
    narrow = sample(logits, params, torch.arange(n), vocab_size)
    wide = sample(logits.float(), params, torch.arange(n), vocab_size)
    assert torch.equal(narrow.tokens, wide.tokens)
    torch.testing.assert_close(narrow.logprobs, wide.logprobs)


@emulated_too
def test_no_rows(sample: Implementation) -> None:
    tokens, logprobs, _ = sample(torch.zeros(0, 50), sampling(0), torch.zeros(0, dtype=torch.int64), 50)
    assert (tokens.shape, tokens.dtype) == ((0,), torch.int64)
    assert (logprobs.shape, logprobs.dtype) == ((0,), torch.float32)


def plain(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """The distribution in fp64: softmax, sort, and one cut after the other, as they are usually described."""
    logits = row.double()
    probabilities = (logits / temperature).softmax(-1)
    order = logits.argsort(descending=True)
    ranked = logits[order]
    kept = logits >= ranked[top_k - 1] if 0 < top_k < len(row) else torch.ones_like(logits, dtype=torch.bool)
    if top_p < 1:
        mass = torch.where(kept, probabilities, 0.0)[order].cumsum(-1)
        count = int((mass < top_p * mass[-1]).sum()) + 1  # the first that reaches it belongs to the set
        kept &= logits >= ranked[count - 1]
    kept &= probabilities >= min_p * probabilities.max()
    cut = torch.where(kept, probabilities, 0.0)
    return cut / cut.sum()


@pytest.mark.parametrize("vocab_size", [1, 2, 17, 400])
def test_reference_is_the_plain_formula(vocab_size: int) -> None:
    n = 100
    logits, params = padded_logits(n, vocab_size, vocab_size + 3, torch.bfloat16, torch.nan), mixed_sampling(n)
    ours = log_probabilities(logits, params, vocab_size).exp()
    for r in range(n):
        row, temperature = logits[r, :vocab_size], params.temperature[r].item()
        cuts = (int(params.top_k[r]), params.top_p[r].item(), params.min_p[r].item())
        greedy = torch.zeros(vocab_size).scatter(0, row.float().argmax()[None], 1.0).double()
        expected = plain(row, temperature, *cuts) if temperature > 0 else greedy
        assert torch.equal(ours[r] > 0, expected > 0)
        torch.testing.assert_close(ours[r].double(), expected, rtol=1e-5, atol=1e-7)


@everyone
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("vary", ["seed", "position"])
def test_frequencies_are_the_probabilities(sample: Implementation, cut: dict[str, Any], vary: str) -> None:
    n = 20000
    positions = torch.arange(n) if vary == "position" else torch.full((n,), 7)
    params = sampling(n, **cut, seed=None if vary == "seed" else 1234567890123456789)
    tokens, logprobs, _ = sample(repeated(PEAKED, n), params, positions, len(PEAKED))
    filled = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | cut
    exact = plain(PEAKED, **filled)
    counts = torch.bincount(tokens, minlength=len(exact))
    assert counts[exact == 0].sum() == 0
    assert_frequencies(counts[exact > 0], exact[exact > 0] * n)
    torch.testing.assert_close(logprobs, exact.log()[tokens].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 9, dtype=torch.float16)}, "float32 or bfloat16"),
        ({"logits": torch.zeros(2, 18)[:, ::2]}, "each row of logits must be contiguous"),
        ({"vocab_size": 10}, "at least 10"),
        ({"params": sampling(3)}, "temperature must be contiguous"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, "positions must be contiguous"),
    ],
)
def test_the_cpu_provider_refuses_what_it_cannot_take(change: dict[str, Any], message: str) -> None:
    good = {"logits": torch.zeros(2, 9), "params": sampling(2), "positions": torch.arange(2), "vocab_size": 9}
    CPU["sample"](**good)
    with pytest.raises(ValueError, match=message):
        CPU["sample"](**(good | change))


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "min_p", "seed"])
@pytest.mark.parametrize(
    "wrong",
    [lambda t: t.double(), lambda t: t[:-1], lambda t: t[:, None], lambda t: t.repeat_interleave(2)[::2]],
    ids=("dtype", "length", "rank", "stride"),
)
def test_parameters_that_are_not_as_described_have_no_layout(
    name: str, wrong: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    params = sampling(5, temperature=0.7)
    assert params.layout == (torch.device("cpu"), 5)
    bad = dataclasses.replace(params, **{name: wrong(getattr(params, name))})
    assert bad.layout is None
    logits = torch.zeros(5, 8)
    with pytest.raises(ValueError, match=f"sample: {name} must be"):
        CPU["sample"](logits, bad, torch.zeros(5, dtype=torch.int64), 8)

"""sample's alternatives: the same from every provider, and what the specification says of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ops_support import (
    Implementation,
    both_dtypes,
    emulated,
    implementations,
    mixed_sampling,
    padded_logits,
    sampling,
    strided_rows,
)
from sample_support import one_row_for_each
from torch import Tensor

from pearl_kernels import Alternatives, SamplingTensors, reference
from pearl_kernels.cpu import OPERATORS as CPU
from pearl_kernels.reference import Stream
from pearl_kernels.reference.philox import gumbel

providers = pytest.mark.parametrize("sample", implementations("sample") + emulated("sample"))
everyone = pytest.mark.parametrize("sample", implementations("sample", with_reference=True) + emulated("sample"))
both_streams = pytest.mark.parametrize("stream", [Stream.SAMPLE, Stream.DRAFT])
CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.0, "top_k": 2, "top_p": 0.1, "min_p": 0.9},  # cuts that nothing of a greedy row depends on
    {"temperature": 0.6, "top_k": 3},
    {"temperature": 1.4, "top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 0.9, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
]


@pytest.fixture(autouse=True)
def same_inputs_always() -> None:
    torch.manual_seed(23)


def alternatives_of(
    sample: Implementation, logits: Tensor, params: SamplingTensors, vocab_size: int, stream: Stream, count: int
) -> Alternatives:
    """And the draw is what it is without them."""
    positions = torch.arange(len(logits)) + 7
    plain = sample(logits, params, positions, vocab_size, stream)
    found = sample(logits, params, positions, vocab_size, stream, count)
    assert plain.alternatives is None
    assert torch.equal(found.tokens, plain.tokens)
    torch.testing.assert_close(found.logprobs, plain.logprobs, rtol=0, atol=0, equal_nan=True)
    ranked: Alternatives = found.alternatives
    assert [t.dtype for t in ranked] == [torch.int64, torch.float32, torch.float32]
    assert [t.shape for t in ranked] == [(len(logits), count), (len(logits), count), (len(logits),)]
    return ranked


def check(
    sample: Implementation, logits: Tensor, params: SamplingTensors, vocab_size: int, stream: Stream, count: int
) -> Alternatives:
    """Beside the reference. Where scores are perturbed, tokens that are closer than rounding may change places."""
    found = alternatives_of(sample, logits, params, vocab_size, stream, count)
    positions = torch.arange(len(logits)) + 7
    expected = reference.sample(logits, params, positions, vocab_size, stream, count).alternatives
    assert expected is not None
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found.drawn, expected.drawn, rtol=1e-5, atol=2e-5)
    steps = torch.cat((expected.drawn[:, None], expected.scores), 1).diff(dim=-1)
    close = (steps.abs() < 1e-4).any(-1) if stream == Stream.SAMPLE else torch.zeros(len(logits), dtype=torch.bool)
    close &= params.temperature > 0
    assert close.float().mean() < 0.2
    assert torch.equal(found.tokens[~close], expected.tokens[~close])
    return found


@providers
@both_streams
@pytest.mark.parametrize("vocab_size", [1, 2, 17, 255, 1031, 4301])
@both_dtypes
def test_mixed_rows_match_reference(
    sample: Implementation, vocab_size: int, stream: Stream, dtype: torch.dtype
) -> None:
    n = 5 if sample.emulated else 40
    logits = padded_logits(n, vocab_size, vocab_size + 9, dtype, torch.inf)
    check(sample, strided_rows(logits), mixed_sampling(n), vocab_size, stream, 8)


@providers
@both_streams
@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_cut_matches_reference(sample: Implementation, stream: Stream, count: int) -> None:
    logits = padded_logits(len(CUTS), 333, 340, torch.float32, torch.nan)
    check(sample, logits, one_row_for_each(CUTS), 333, stream, count)


@providers
@both_streams
def test_ties_go_to_the_lower_token(sample: Implementation, stream: Stream) -> None:
    """Few distinct values. Where noise decides there are no ties."""
    n = 4 if sample.emulated else 40
    logits = padded_logits(n, 2333, 2340, torch.float32, torch.nan).round()
    params = sampling(n, temperature=0.0) if stream == Stream.SAMPLE else sampling(n, temperature=0.7)
    found = check(sample, logits, params, 2333, stream, 8)
    values = logits.gather(1, found.tokens)
    tied = values[:, 1:] == values[:, :-1]
    assert tied.float().mean() > 0.5
    assert (found.tokens[:, 1:] > found.tokens[:, :-1])[tied].all()


@everyone
@both_streams
def test_values_too_close_for_their_probabilities_keep_their_order(sample: Implementation, stream: Stream) -> None:
    """Their log-probabilities are equal in fp32; their logits are not."""
    row = torch.full((20,), -300.0)
    row[5], row[9], row[2] = 1e-6, 2e-6, 3e-6
    row[17] = 40.0  # drawn, whatever the noise: the others are left for the alternatives
    params = sampling(1, temperature=0.0 if stream == Stream.SAMPLE else 1.0)
    found = alternatives_of(sample, row[None], params, 20, stream, 4)
    assert found.tokens[0].tolist() == [2, 9, 5, 0]


@everyone
@both_streams
def test_a_support_that_is_too_small_ends_early(sample: Implementation, stream: Stream) -> None:
    row = torch.tensor([-torch.inf, 1.0, torch.nan, 3.0, 2.0, -torch.inf, 0.0])
    params = one_row_for_each([{}, {"temperature": 0.0}, {"top_k": 2}, {"top_k": 1}])
    found = alternatives_of(sample, row.repeat(4, 1), params, 7, stream, 5)
    there = found.tokens >= 0
    assert there.sum(-1).tolist() == [3, 3, 1, 0]
    assert torch.equal(there, found.scores > -torch.inf)
    assert (found.scores[~there] == -torch.inf).all()
    assert (found.tokens[~there] == -1).all()
    assert not set(found.tokens[there].tolist()) & {0, 2, 5}
    assert found.tokens[1, :3].tolist() == [4, 1, 6]


@everyone
@both_streams
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_distribution_has_none(sample: Implementation, stream: Stream, value: float) -> None:
    """One infinite logit is enough for +inf; all are it otherwise."""
    params = one_row_for_each(CUTS)
    logits = padded_logits(len(CUTS), 50, 50, torch.float32, 0.0)
    logits[:, 3 if value == torch.inf else slice(None)] = value
    found = alternatives_of(sample, logits, params, 50, stream, 3)
    assert (found.tokens == -1).all()
    assert (found.scores == -torch.inf).all()
    assert found.drawn.isnan().all()


@everyone
@both_streams
def test_no_rows(sample: Implementation, stream: Stream) -> None:
    alternatives_of(sample, torch.zeros(0, 50), sampling(0), 50, stream, 3)


@pytest.mark.parametrize("provider", ["cpu", "triton"])
@pytest.mark.parametrize("count", [-1, 9])
def test_counts_out_of_range_are_refused(provider: str, count: int) -> None:
    sample = CPU["sample"] if provider == "cpu" else emulated("sample")[0].values[0]
    with pytest.raises(ValueError, match=f"alternatives must be 0 to 8, not {count}"):
        sample(torch.zeros(1, 5), sampling(1), torch.zeros(1, dtype=torch.int64), 5, Stream.DRAFT, count)


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize("cut", CUTS)
def test_the_reference_ranks_what_would_be_drawn_next(stream: Stream, cut: dict[str, Any]) -> None:
    """Independently: in fp64, tokens taken away one after the other."""
    n, vocab_size = 20, 60
    logits, params = padded_logits(n, vocab_size, vocab_size, torch.float32, 0.0), sampling(n, **cut)
    positions = torch.arange(n) + 7
    found = reference.sample(logits, params, positions, vocab_size, stream, 4)
    assert found.alternatives is not None
    for row in range(n):
        kept = log_probabilities_of(logits[row], cut)
        noise = gumbel(params.seed[row : row + 1], positions[row : row + 1], stream, vocab_size)[0].tolist()
        scores = {token: logp + noise[token] * (stream == Stream.SAMPLE) for token, logp in kept.items()}
        if cut.get("temperature") == 0.0:
            scores = kept
        drawn = int(found.tokens[row])
        assert math.isclose(scores.pop(drawn), found.alternatives.drawn[row], rel_tol=1e-5, abs_tol=1e-5)
        order = sorted(scores, key=lambda token: -scores[token])[:4]
        assert found.alternatives.tokens[row].tolist() == order + [-1] * (4 - len(order))
        for place, token in enumerate(order):
            assert math.isclose(scores[token], found.alternatives.scores[row, place], rel_tol=1e-5, abs_tol=1e-5)


def log_probabilities_of(row: Tensor, cut: dict[str, Any]) -> dict[int, float]:
    """Of what top-k, top-p and min-p keep; of all at temperature 1 for a greedy row."""
    temperature = cut.get("temperature", 1.0)
    if temperature == 0.0:
        return dict(enumerate(row.double().log_softmax(-1).tolist()))
    p = (row.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()[: cut.get("top_k") or None]
    mass, total, kept = 0.0, sum(p[token].item() for token in order), []
    for token in order:
        if mass < cut.get("top_p", 1.0) * total and p[token] >= cut.get("min_p", 0.0) * p.max():
            kept.append(token)
        mass += p[token].item()
    left = sum(p[token].item() for token in kept)
    return {token: math.log(p[token].item() / left) for token in kept}

"""verify of the GPU providers, on CPU tensors. Verdicts that equal the reference's keep the target's distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_support import (
    Implementation,
    decided,
    emulated,
    mixed_sampling,
    padded_logits,
    reference_result,
    sampling,
)
from torch import Tensor
from verify_support import (
    Case,
    acceptance_rows,
    assert_same,
    check,
    decided_requests,
    one_row_each,
    ragged,
    requests_of,
)

from pearl_kernels.reference import Rule, Verdict

providers = pytest.mark.parametrize("verify", emulated("verify"))
both_rules = pytest.mark.parametrize("rule", ["rejection", "coupled"])
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LARGE = 4301  # logits: more than one program has, more than a program takes at once


@pytest.fixture(autouse=True)
def same_inputs_always() -> None:
    torch.manual_seed(15)


def few(rule: Rule, vocab_size: int, dtype: torch.dtype = F32, requests: int = 10) -> Case:
    return ragged(rule, vocab_size, dtype, dtype, requests)


def rows_of(case: Case, rows: Tensor) -> Case:
    return {k: case[k][rows] for k in ("logits", "draft_tokens", "positions", "draft_logprobs", "draft_rows")}


@providers
@pytest.mark.parametrize(
    ("rule", "vocab_size", "dtype", "q_dtype"),
    [
        ("rejection", 3, F32, F16),
        ("rejection", 255, BF16, F32),
        ("rejection", 17, F16, BF16),
        ("coupled", 3, F32, F32),
        ("coupled", 255, BF16, BF16),
    ],
    ids=("rejection-3", "rejection-255", "rejection-17", "coupled-3", "coupled-255"),
)
def test_ragged_batches_match_reference(
    verify: Implementation, rule: Rule, vocab_size: int, dtype: torch.dtype, q_dtype: torch.dtype
) -> None:
    """The draft's dtype need not be the target's."""
    check(verify, ragged(rule, vocab_size, dtype, q_dtype, requests=16))


@providers
@both_rules
def test_rows_of_several_tiles_match_reference(verify: Implementation, rule: Rule) -> None:
    case = few(rule, LARGE, BF16, requests=7)
    expected = reference_result("verify", **case)
    clear = decided_requests(case, expected.accepted)
    accepted, next_token = verify(**case)
    assert torch.equal(accepted[clear], expected.accepted[clear])
    assert torch.equal(next_token[clear], expected.next_token[clear])


@providers
def test_a_q_row_is_read_only_where_a_residual_is_needed(verify: Implementation) -> None:
    case = few("rejection", 40, requests=11)
    before = verify(**case)
    request, row = requests_of(case), torch.arange(len(case["draft_tokens"]))
    rejected = acceptance_rows(case) & (row == (case["row_start"][:-1] + before.accepted)[request])
    needed = case["draft_rows"][rejected & (case["draft_rows"] >= 0)].long()
    poisoned = torch.full_like(case["draft_logits"], torch.nan)
    poisoned[needed] = case["draft_logits"][needed]
    assert 1 < len(needed) < len(row) / 2
    assert_same(verify(**(case | {"draft_logits": poisoned})), before)


@providers
@both_rules
def test_a_request_does_not_depend_on_its_batch(verify: Implementation, rule: Rule) -> None:
    case = few(rule, 60, BF16)
    together = verify(**case)
    for r in range(1, 6):
        begin, end = case["row_start"][r : r + 2].tolist()
        one = torch.tensor([r])
        request = {"params": case["params"][one], "draft_temperature": case["draft_temperature"][one]}
        starts = {"row_start": torch.tensor([0, end - begin], dtype=torch.int32)}
        alone = verify(**(case | rows_of(case, slice(begin, end)) | request | starts))
        assert_same(alone, Verdict(together.accepted[one], together.next_token[one]))


@providers
@both_rules
def test_rows_of_no_request_are_ignored(verify: Implementation, rule: Rule) -> None:
    """As where a batch is padded to the size of a captured graph."""
    case = few(rule, 30)
    n = len(case["draft_tokens"])
    before, wide = verify(**case), {}
    for name in ("logits", "draft_tokens", "positions", "draft_logprobs", "draft_rows"):
        poison = torch.nan if case[name].is_floating_point() else torch.iinfo(case[name].dtype).max
        wide[name] = torch.full((n + 8, *case[name].shape[1:]), poison, dtype=case[name].dtype)
        wide[name][3 : n + 3] = case[name]
    assert_same(verify(**(case | wide | {"row_start": case["row_start"] + 3})), before)


@providers
@both_rules
def test_greedy_accepts_exactly_the_first_largest_logit(verify: Implementation, rule: Rule) -> None:
    """And needs nothing of the draft but its tokens, under either rule."""
    n, vocab_size = 12, 90
    logits = padded_logits(n, vocab_size, vocab_size, BF16, 0.0).clamp(max=5.0)
    logits[:, [30, 80]] = 5.0
    best = logits.float().argmax(-1)
    tokens = torch.where(torch.arange(n) % 2 == 0, best, 80)  # as large, but later
    tokens[-2:] = -1
    starts = torch.arange(n + 1, dtype=torch.int32)
    accepted, next_token = verify(logits, tokens, starts, torch.arange(n), sampling(n, 0.0), vocab_size, rule)
    assert (best <= 30).all()
    assert torch.equal(accepted, (tokens == best).int())
    assert torch.equal(next_token, torch.where(tokens == best, -1, best))


@providers
def test_coupled_returns_what_sample_draws(verify: Implementation) -> None:
    n, vocab_size = 9, 70
    logits, params = padded_logits(n, vocab_size, 75, BF16, torch.inf), mixed_sampling(n)
    positions, starts = torch.arange(n) + 2**32 - n, torch.arange(n + 1, dtype=torch.int32)
    drawn = reference_result("sample", logits, params, positions, vocab_size).tokens
    clear = decided(logits, params, positions, vocab_size)
    for tokens, accept in ((drawn, True), ((drawn + 1) % vocab_size, False), (torch.full((n,), -1), False)):
        accepted, next_token = verify(logits, tokens, starts, positions, params, vocab_size, "coupled")
        assert (accepted[clear] == int(accept)).all()
        assert torch.equal(next_token[clear], torch.full((n,), -1)[clear] if accept else drawn[clear])


@providers
@pytest.mark.parametrize("given", [("draft_logprobs",), ("draft_logprobs", "draft_rows"), ()])
def test_a_draft_that_is_certain_needs_no_distribution(verify: Implementation, given: tuple[str, ...]) -> None:
    """As of n-grams: q is the point mass, whose logarithm is 0."""
    n, vocab_size = 14, 12
    logits, params = padded_logits(n, vocab_size, 14, F32, torch.nan) * 0.3, mixed_sampling(n)
    case = one_row_each(logits, params, torch.randint(0, vocab_size, (n,))) | {"vocab_size": vocab_size}
    expected = reference_result("verify", **case)
    no_draft = {"draft_logits": torch.zeros(1, vocab_size), "draft_temperature": torch.ones(n), "rule": "rejection"}
    clear = decided_requests(case | no_draft, expected.accepted)
    left = {name: case[name] if name in given else None for name in ("draft_logprobs", "draft_rows")}
    accepted, next_token = verify(**(case | left))
    assert 0 < expected.accepted.sum() < n
    assert torch.equal(accepted[clear], expected.accepted[clear])
    assert torch.equal(next_token[clear], expected.next_token[clear])


@providers
@pytest.mark.parametrize(
    ("rule", "value"), [("rejection", torch.nan), ("rejection", -torch.inf), ("coupled", torch.nan)]
)
def test_a_row_without_a_distribution_harms_nothing(verify: Implementation, rule: Rule, value: float) -> None:
    case = few(rule, 25)
    before, sick = verify(**case), torch.arange(10) % 3 == 2
    logits, draft_logits = case["logits"].clone(), case["draft_logits"].clone()
    logits[sick[requests_of(case)]] = value
    draft_logits[case["draft_rows"][sick[requests_of(case)]].clamp(min=0).long()] = value
    accepted, next_token = verify(**(case | {"logits": logits, "draft_logits": draft_logits}))
    assert torch.equal(accepted[~sick], before.accepted[~sick])
    assert torch.equal(next_token[~sick], before.next_token[~sick])
    sizes = case["row_start"].diff()
    assert ((accepted >= 0) & (accepted <= sizes)).all()
    assert ((next_token >= -1) & (next_token < 25)).all()
    assert ((next_token >= 0) == (accepted < sizes)).all()


@providers
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "hope"}, "rule must be 'rejection', 'coupled' or 'block', not 'hope'"),
        ({"row_start": torch.zeros(0, dtype=torch.int32)}, "row_start needs at least one entry"),
        ({"row_start": torch.tensor([0, 1, 2])}, "row_start must be contiguous"),
        ({"logits": torch.zeros(2, 9, dtype=torch.float64)}, "logits must be float32"),
        ({"logits": torch.zeros(2, 8)}, "logits must be"),
        ({"draft_logits": torch.zeros(1, 18)[:, ::2]}, "each row of draft_logits must be contiguous"),
        ({"draft_logits": torch.zeros(1, 8)}, "draft_logits must be"),
        ({"draft_tokens": torch.tensor([1, 2, 3])}, "draft_tokens must be contiguous"),
        ({"draft_logprobs": torch.zeros(2, dtype=torch.float64)}, "draft_logprobs must be contiguous"),
        ({"draft_rows": torch.zeros(2, dtype=torch.int64)}, "draft_rows must be contiguous"),
        ({"draft_temperature": torch.ones(3)}, "draft_temperature must be contiguous"),
        ({"params": sampling(3)}, "temperature must be contiguous"),
    ],
)
def test_bad_input_is_refused(verify: Implementation, change: dict[str, Any], message: str) -> None:
    draft = {"draft_logits": torch.zeros(1, 9), "draft_temperature": torch.ones(2)}
    case = one_row_each(torch.zeros(2, 9), sampling(2), torch.tensor([3, 0]), **draft)
    verify(**case)
    with pytest.raises(ValueError, match=message):
        verify(**(case | change))

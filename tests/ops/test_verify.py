"""verify: every provider's verdicts are the reference's, and what is committed has the target's distribution."""

from __future__ import annotations

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
)
from verify_support import acceptance_rows, assert_same, check, decided_requests, one_row_each, ragged, requests_of

from pearl_kernels import SamplingTensors, reference
from pearl_kernels.cpu import OPERATORS as CPU
from pearl_kernels.reference import Rule, Stream, Verdict

providers = pytest.mark.parametrize("verify", implementations("verify"))
everyone = pytest.mark.parametrize("verify", implementations("verify", with_reference=True))
emulated_too = pytest.mark.parametrize("verify", implementations("verify", with_reference=True) + emulated("verify"))
both_rules = pytest.mark.parametrize("rule", ["rejection", "coupled"])

F32, BF16 = torch.float32, torch.bfloat16
LARGE = 4301  # logits: more than a GPU's program takes at once


@pytest.fixture(autouse=True)
def same_inputs_always() -> None:
    torch.manual_seed(5)


@providers
@both_rules
@pytest.mark.parametrize("vocab_size", [3, 1031])
@pytest.mark.parametrize("q_dtype", [F32, BF16], ids=("fp32", "bf16"))
@both_dtypes
def test_ragged_batches_match_reference(
    verify: Implementation, rule: Rule, vocab_size: int, dtype: torch.dtype, q_dtype: torch.dtype
) -> None:
    """The draft's dtype need not be the target's."""
    check(verify, ragged(rule, vocab_size, dtype, q_dtype))


@emulated_too
def test_a_draft_without_some_tokens_matches_reference(verify: Implementation) -> None:
    """Their logits are -inf: q is 0, and a residual is p."""
    case = ragged("rejection", 40, F32, BF16, requests=9, known=25)
    expected, ours = reference.verify(**case), verify(**case)
    clear = decided_requests(case, expected.accepted)
    assert_same(Verdict(*(field[clear] for field in ours)), Verdict(*(field[clear] for field in expected)))
    assert (expected.accepted > 0).any()
    assert (expected.next_token[clear] >= 25).any()


@everyone
def test_a_q_row_is_read_only_where_a_residual_is_needed(verify: Implementation) -> None:
    case = ragged("rejection", 40, F32, F32)
    before = verify(**case)
    request, row = requests_of(case), torch.arange(len(case["draft_tokens"]))
    rejected = acceptance_rows(case) & (row == (case["row_start"][:-1] + before.accepted)[request])
    needed = case["draft_rows"][rejected & (case["draft_rows"] >= 0)].long()
    poisoned = torch.full_like(case["draft_logits"], torch.nan)
    poisoned[needed] = case["draft_logits"][needed]
    assert 5 < len(needed) < len(row) / 2
    assert_same(verify(**(case | {"draft_logits": poisoned})), before)


@everyone
@both_rules
def test_a_request_does_not_depend_on_its_batch(verify: Implementation, rule: Rule) -> None:
    case = ragged(rule, 60, BF16, F32)
    together = verify(**case)
    for r in range(1, 12):
        begin, end = case["row_start"][r : r + 2].tolist()
        mine, one = slice(begin, end), torch.tensor([r])
        rows = {k: case[k][mine] for k in ("logits", "draft_tokens", "positions", "draft_logprobs", "draft_rows")}
        request = {"params": case["params"][one], "draft_temperature": case["draft_temperature"][one]}
        alone = verify(**(case | rows | request | {"row_start": torch.tensor([0, end - begin], dtype=torch.int32)}))
        assert_same(alone, Verdict(together.accepted[one], together.next_token[one]))


@emulated_too
@both_rules
def test_nothing_to_do(verify: Implementation, rule: Rule) -> None:
    none, starts = torch.zeros(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int32)
    accepted, next_token = verify(torch.zeros(0, 9), none, starts, none, sampling(3), 9, rule)
    assert accepted.tolist() == [0, 0, 0]
    assert next_token.tolist() == [-1, -1, -1]
    accepted, next_token = verify(torch.zeros(0, 9), none, starts[:1], none, sampling(0), 9, rule)
    assert (accepted.shape, next_token.shape) == ((0,), (0,))


@everyone
@both_rules
@both_dtypes
def test_greedy_accepts_exactly_the_first_largest_logit(verify: Implementation, rule: Rule, dtype: torch.dtype) -> None:
    n, vocab_size = 40, 90
    logits = padded_logits(n, vocab_size, vocab_size, dtype, 0.0).clamp(max=5.0)
    logits[:, [30, 80]] = 5.0
    best = logits.float().argmax(-1)
    tokens = torch.where(torch.arange(n) % 2 == 0, best, 80)  # as large, but later
    case = one_row_each(logits, sampling(n, 0.0), tokens, draft_logprobs=torch.full((n,), -50.0)) | {"rule": rule}
    accepted, next_token = verify(**case)
    assert (best <= 30).all()
    assert torch.equal(accepted, (tokens == best).int())
    assert torch.equal(next_token, torch.where(tokens == best, -1, best))


@emulated_too
@pytest.mark.parametrize("how", ["cut", "infinite"])
@pytest.mark.parametrize("draft_logprob", [0.0, -80.0, -torch.inf])
def test_a_token_without_probability_is_never_accepted(verify: Implementation, how: str, draft_logprob: float) -> None:
    """ANCHORS bug 10. Nor is it drawn as a replacement."""
    n = 4 if verify.emulated else 100
    row = torch.tensor([1.0, 0.5, 0.2, -1.0 if how == "cut" else -torch.inf])
    params = sampling(n, top_k=3 if how == "cut" else 0)
    q = {"draft_logits": torch.zeros(1, 4), "draft_rows": torch.arange(n).int() % 2 - 1}
    q |= {"draft_logprobs": torch.full((n,), draft_logprob), "draft_temperature": torch.ones(n)}
    accepted, next_token = verify(**one_row_each(row.repeat(n, 1), params, torch.full((n,), 3), **q))
    assert accepted.sum() == 0
    assert ((next_token >= 0) & (next_token < 3)).all()


@emulated_too
@pytest.mark.parametrize(("point_mass", "vocab_size"), [(False, 50), (True, 50), (False, LARGE)])
@both_dtypes
def test_a_zero_residual_falls_back_to_p(
    verify: Implementation, point_mass: bool, vocab_size: int, dtype: torch.dtype
) -> None:
    """A draft that understates its own probabilities can be rejected although p = q."""
    n = 2 if vocab_size == LARGE else 6 if verify.emulated else 60
    logits = padded_logits(n, vocab_size, vocab_size, dtype, 0.0)
    params = sampling(n, top_k=1) if point_mass else sampling(n, temperature=0.8, top_p=0.9)
    rows = torch.full((n,), -1, dtype=torch.int32) if point_mass else torch.arange(n, dtype=torch.int32)
    q = {"draft_logits": logits.clone(), "draft_rows": rows, "draft_temperature": params.temperature}
    case = one_row_each(logits, params, logits.float().argmax(-1), draft_logprobs=torch.full((n,), 60.0), **q)
    accepted, next_token = verify(**case)
    assert accepted.sum() == 0
    clear = decided(logits, params, case["positions"], vocab_size, Stream.RESIDUAL)
    drawn = reference.sample(logits, params, case["positions"], vocab_size, Stream.RESIDUAL).tokens
    assert torch.equal(next_token[clear], drawn[clear])


@emulated_too
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_draft_that_is_broken_changes_no_distribution(verify: Implementation, value: float) -> None:
    """Its tokens have no q: they are rejected, and p is drawn from whole."""
    n, vocab_size = 4 if verify.emulated else 60, 50
    logits, params = padded_logits(n, vocab_size, vocab_size, F32, 0.0), sampling(n, temperature=0.8)
    sick = torch.full((1, vocab_size), value)
    if value == torch.inf:
        sick[:, 1:] = 0.0  # one is enough
    q = {"draft_logits": sick, "draft_rows": torch.zeros(n, dtype=torch.int32)}
    q |= {"draft_logprobs": torch.full((n,), torch.nan), "draft_temperature": torch.ones(n)}
    case = one_row_each(logits, params, torch.zeros(n, dtype=torch.int64), **q)
    accepted, next_token = verify(**case)
    assert accepted.sum() == 0
    drawn = reference.sample(logits, params, case["positions"], vocab_size, Stream.RESIDUAL).tokens
    clear = decided(logits, params, case["positions"], vocab_size, Stream.RESIDUAL)
    assert torch.equal(next_token[clear], drawn[clear])


@emulated_too
@both_rules
def test_equal_logits_in_a_wider_dtype_are_judged_alike(verify: Implementation, rule: Rule) -> None:
    case = ragged(rule, 40, BF16, BF16, requests=6 if verify.emulated else 44)
    assert_same(verify(**case), verify(**(case | {"logits": case["logits"].float()})))


@pytest.mark.parametrize("provider", ["cpu", "reference"])
@both_dtypes
def test_coupled_returns_what_sample_draws(provider: str, dtype: torch.dtype) -> None:
    """And needs nothing of the draft but its tokens."""
    operators = CPU if provider == "cpu" else {"sample": reference.sample, "verify": reference.verify}
    n, vocab_size = 80, 70
    logits, params = padded_logits(n, vocab_size, 75, dtype, torch.inf), mixed_sampling(n)
    positions, starts = torch.arange(n) + 2**31, torch.arange(n + 1, dtype=torch.int32)
    drawn = operators["sample"](logits, params, positions, vocab_size, Stream.SAMPLE).tokens
    for tokens, accept in ((drawn, True), ((drawn + 1) % vocab_size, False), (torch.full((n,), -1), False)):
        accepted, next_token = operators["verify"](logits, tokens, starts, positions, params, vocab_size, "coupled")
        assert torch.equal(accepted, torch.full((n,), int(accept), dtype=torch.int32))
        assert torch.equal(next_token, torch.full((n,), -1) if accept else drawn)


@everyone
@both_rules
@pytest.mark.parametrize("draft", ["other temperature", "greedy", "point mass"])
def test_the_committed_token_has_the_targets_distribution(verify: Implementation, rule: Rule, draft: str) -> None:
    """Two rows for each of many seeds: a tested token, then a bonus token."""
    n, vocab_size = 500 if verify.function is reference.verify else 20000, 7
    p_row = torch.tensor([1.0, -0.2, 0.3, 1.2, -5.0, 0.1, -0.7])
    q_row = torch.tensor([0.2, 0.9, 0.3, 1.1, 0.4, -0.6, -0.1])
    params = sampling(n, temperature=0.9, top_k=6, min_p=0.02)
    certain = draft == "point mass"
    temperature = torch.full((n,), 0.0 if draft == "greedy" else 1.3)
    drafter = SamplingTensors(temperature, params.top_k, params.top_p, params.min_p, params.seed)
    positions = torch.tensor([4, 5]).repeat(n)
    stream = Stream.SAMPLE if rule == "coupled" else Stream.DRAFT
    tokens, logprobs, _ = reference.sample(q_row.repeat(n, 1), drafter, positions[::2], vocab_size, stream)
    if certain:
        tokens, logprobs = torch.arange(n) % vocab_size, torch.zeros(n)
    rows = torch.stack((tokens, torch.full((n,), -1)), 1).flatten()
    starts = torch.arange(n + 1, dtype=torch.int32) * 2
    q = (logprobs.repeat_interleave(2), q_row[None], torch.full((2 * n,), -int(certain), dtype=torch.int32))
    logits = p_row.repeat(2 * n, 1)
    accepted, drawn = verify(logits, rows, starts, positions, params, vocab_size, rule, *q, temperature)
    hit = accepted == 1
    assert 0.05 < hit.float().mean() < 0.95
    kept = p_row > -5  # top-k's doing; min-p excludes nothing
    exact = (p_row.double() / 0.9)[kept].softmax(-1)
    for committed in (torch.where(hit, tokens, drawn), drawn[hit]):
        counts = torch.bincount(committed, minlength=vocab_size)
        assert counts[~kept].sum() == 0
        assert_frequencies(counts[kept], exact * len(committed))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "hope"}, "rule must be"),
        ({"rule": "block", "draft_rows": None}, "needs? draft_logprobs and draft_rows"),
        ({"draft_tokens": torch.tensor([9, 0])}, "a drafted token is 9"),
        ({"draft_logprobs": None}, "need draft_logprobs"),
        ({"draft_rows": torch.tensor([0, 1], dtype=torch.int32)}, "a draft row is 1, must be below 1"),
        ({"row_start": torch.tensor([0, 2, 1], dtype=torch.int32)}, "row_start falls at entry 2"),
        ({"row_start": torch.tensor([0, 1, 3], dtype=torch.int32)}, "last entry of row_start is 3"),
    ],
)
def test_the_cpu_provider_refuses_what_it_cannot_take(change: dict[str, Any], message: str) -> None:
    draft = {"draft_logits": torch.zeros(1, 9), "draft_temperature": torch.ones(2)}
    case = one_row_each(torch.zeros(2, 9), sampling(2), torch.tensor([3, 0]), **draft)
    CPU["verify"](**case)
    with pytest.raises(ValueError, match=message):
        CPU["verify"](**(case | change))

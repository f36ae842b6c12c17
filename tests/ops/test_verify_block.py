"""verify, rule="block": exact by enumeration, never less accepted than token by token, the same from every provider."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from ops_support import (
    Implementation,
    assert_frequencies,
    both_dtypes,
    emulated,
    implementations,
    mixed_sampling,
    padded_logits,
    sampling,
)
from torch import Tensor
from verify_support import Case, assert_same, block_shares, check, decided_requests, one_row_each, ragged, rows_of

from pearl_kernels import SamplingTensors, Situation, cuda, reference
from pearl_kernels.reference import Stream, Verdict, verification
from pearl_kernels.reference.philox import uniform

HERE = implementations("verify")
GPU = [p for p in emulated("verify") if p.id != "cuda"]  # whose kernels refuse the rule
providers = pytest.mark.parametrize("verify", HERE)
everyone = pytest.mark.parametrize("verify", implementations("verify", with_reference=True))
emulated_too = pytest.mark.parametrize("verify", HERE + GPU)

F32, BF16 = torch.float32, torch.bfloat16
LARGE = 4301  # logits: more than a GPU's program takes at once


@pytest.fixture(autouse=True)
def same_inputs_always() -> None:
    torch.manual_seed(31)


@providers
@pytest.mark.parametrize("vocab_size", [3, 1031])
@pytest.mark.parametrize("q_dtype", [F32, BF16], ids=("fp32", "bf16"))
@both_dtypes
def test_ragged_batches_match_reference(
    verify: Implementation, vocab_size: int, dtype: torch.dtype, q_dtype: torch.dtype
) -> None:
    check(verify, ragged("block", vocab_size, dtype, q_dtype))


@emulated_too
def test_what_follows_tokens_of_little_weight_matches_reference(verify: Implementation) -> None:
    """The draft is far from the target: many blocks hold in part, behind tokens that the target likes less."""
    requests = 40 if verify.emulated else 120
    case = ragged("block", 12, F32, F32, requests=requests, apart=4.0)
    case["params"] = sampling(requests, temperature=1.5)
    case["draft_temperature"] = torch.full((requests,), 1.5)
    row = case["draft_rows"] >= 0
    q = reference.sampling.log_probabilities(case["draft_logits"], sampling(len(case["draft_logits"]), 1.5), 12)
    drafted = case["draft_tokens"].clamp(min=0)[:, None]
    case["draft_logprobs"] = torch.where(row, q[case["draft_rows"].clamp(min=0)].gather(1, drafted)[:, 0], 0.0)
    expected, ours = reference.verify(**case), verify(**case)
    clear = decided_requests(case, expected.accepted)
    assert_same(Verdict(*(field[clear] for field in ours)), Verdict(*(field[clear] for field in expected)))
    light = 0
    for r, (begin, held) in enumerate(zip(case["row_start"].tolist(), expected.accepted.tolist(), strict=False)):
        light += held > 0 and block_shares(rows_of(case, r), begin, begin + held)[0][held] < 0.7
    assert light > requests / 30


@pytest.mark.parametrize("verify", GPU)
@pytest.mark.parametrize(("vocab_size", "requests"), [(40, 12), (LARGE, 5)])
@both_dtypes
def test_ragged_batches_on_a_gpu_match_reference(
    verify: Implementation, vocab_size: int, requests: int, dtype: torch.dtype
) -> None:
    case = ragged("block", vocab_size, dtype, dtype, requests=requests, known=vocab_size - 5)
    expected, ours = reference.verify(**case), verify(**case)
    clear = decided_requests(case, expected.accepted)
    assert_same(Verdict(*(field[clear] for field in ours)), Verdict(*(field[clear] for field in expected)))
    assert (expected.accepted > 0).any()


@emulated_too
def test_a_block_of_one_token_is_a_rejection_test(verify: Implementation) -> None:
    n, vocab_size = 12 if verify.emulated else 300, 50
    logits, params = padded_logits(n, vocab_size, vocab_size + 3, BF16, torch.nan), mixed_sampling(n)
    q = logits + 0.3 * torch.randn_like(logits)
    positions = torch.full((n,), 10)
    drafted = reference.sample(q, params, positions, vocab_size, Stream.DRAFT)
    draft = {"draft_logits": q, "draft_rows": torch.arange(n).int(), "draft_temperature": params.temperature}
    case = one_row_each(logits, params, drafted.tokens, draft_logprobs=drafted.logprobs, **draft)
    case |= {"vocab_size": vocab_size}
    block = verify(**case, rule="block")
    assert_same(block, verify(**case, rule="rejection"))
    assert 0 < block.accepted.sum() < n


@pytest.mark.parametrize("verify", implementations("verify", with_reference=True) + GPU)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_without_a_distribution_rejects(verify: Implementation, value: float) -> None:
    """Target and draft are the same, so that all before it holds; where it is the draft's, p is drawn from whole."""
    n, g, vocab_size = 4 if verify.emulated else 20, 4, 30
    logits, params = padded_logits(n * g, vocab_size, vocab_size, F32, 0.0), sampling(n)
    q, request = logits.clone(), torch.arange(n).repeat_interleave(g)
    positions = torch.arange(g).repeat(n) + 5
    drafted = reference.sample(q, params[request], positions, vocab_size, Stream.DRAFT)
    case: Case = {"params": params, "positions": positions, "vocab_size": vocab_size, "rule": "block"}
    case |= {"row_start": torch.arange(n + 1).int() * g, "draft_temperature": torch.ones(n)}
    case |= {"draft_tokens": drafted.tokens, "draft_rows": torch.arange(n * g).int()}
    sick = logits.clone()
    sick[2::g, 3 if value == torch.inf else slice(None)] = value
    accepted, next_token = verify(logits=sick, draft_logits=q, draft_logprobs=drafted.logprobs, **case)
    assert (accepted == 2).all()
    assert (next_token == 0).all()
    logprobs = drafted.logprobs.clone()
    logprobs[2::g] = torch.nan
    accepted, next_token = verify(logits=logits, draft_logits=sick, draft_logprobs=logprobs, **case)
    assert (accepted == 2).all()
    drawn = reference.sample(logits, params[request], positions, vocab_size, Stream.RESIDUAL).tokens
    assert torch.equal(next_token, drawn[2::g])


@pytest.mark.parametrize("verify", implementations("verify", with_reference=True) + GPU)
@pytest.mark.parametrize(("others", "cut"), [(-torch.inf, {}), (-5.0, {"top_k": 2})], ids=("uncut", "cut"))
def test_mass_at_the_end_of_a_large_vocabulary_counts(verify: Implementation, others: float, cut: Any) -> None:
    """The first token's weight is 1/2, the second cannot hold; behind the first 1/4 is left, all of it at the end."""
    n, end = 24, LARGE - 10
    logits, q = torch.full((2 * n, LARGE), others), torch.full((n, LARGE), others)
    logits[::2, [7, 8]] = 0.0
    logits[1::2, [5, end]] = 0.0
    q[:, [3, 5]] = 0.0
    params, positions = sampling(n, **cut), torch.arange(2).repeat(n)
    case: Case = {"logits": logits, "params": params, "positions": positions, "vocab_size": LARGE, "rule": "block"}
    case |= {"row_start": torch.arange(n + 1).int() * 2, "draft_tokens": torch.tensor([7, 3]).repeat(n)}
    case |= {"draft_logits": q, "draft_rows": torch.stack((torch.full((n,), -1), torch.arange(n)), 1).flatten().int()}
    case |= {"draft_logprobs": torch.tensor([0.0, math.log(0.5)]).repeat(n), "draft_temperature": torch.ones(n)}
    accepted, next_token = verify(**case)
    holds = uniform(params.seed, positions[::2], Stream.ACCEPT) < (1 / 4) / (1 / 4 + 1 - 1 / 2)
    assert 0 < holds.sum() < n
    assert torch.equal(accepted, holds.int())
    assert torch.equal(next_token, torch.where(holds, end, 8))


@emulated_too
def test_equal_logits_in_a_wider_dtype_are_judged_alike(verify: Implementation) -> None:
    case = ragged("block", 40, BF16, BF16, requests=6 if verify.emulated else 44)
    assert_same(verify(**case), verify(**(case | {"logits": case["logits"].float()})))


# What is committed, on vocabularies that can be enumerated -----------------------------------------------------------


class Tiny:
    """Two models of V tokens whose logits depend on the whole prefix; the draft is some way from the target."""

    def __init__(self, vocab_size: int, blur: float, depth: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size, self.depth = vocab_size, depth
        self.p: dict[tuple[int, ...], Tensor] = {}
        self.q: dict[tuple[int, ...], Tensor] = {}
        for length in range(depth + 1):
            for prefix in itertools.product(range(vocab_size), repeat=length):
                self.p[prefix] = 1.3 * torch.randn(vocab_size, generator=generator)
                self.q[prefix] = self.p[prefix] + blur * torch.randn(vocab_size, generator=generator)

    def joint(self, params: SamplingTensors, length: int) -> dict[tuple[int, ...], float]:
        """The target's probability of every continuation of this length."""
        one = {(): 1.0}
        for _ in range(length):
            one = {
                (*prefix, token): mass * p
                for prefix, mass in one.items()
                for token, p in enumerate(probabilities(self.p[prefix], params))
            }
        return one


def probabilities(row: Tensor, params: SamplingTensors) -> list[float]:
    values: list[float] = reference.sampling.log_probabilities(row[None], params, len(row))[0].double().exp().tolist()
    return values


def block_of(tiny: Tiny, path: Sequence[int], params: SamplingTensors, drafter: SamplingTensors, bonus: bool) -> Case:
    """One request that tests a path of drafted tokens."""
    prefixes = [tuple(path[:i]) for i in range(len(path) + bonus)]
    q = torch.stack([tiny.q[prefix] for prefix in prefixes])
    log_q = reference.sampling.log_probabilities(q, drafter[torch.zeros(len(q)).long()], tiny.size)
    tokens = torch.tensor([*path, -1][: len(prefixes)])
    return {
        "logits": torch.stack([tiny.p[prefix] for prefix in prefixes]),
        "draft_tokens": tokens,
        "row_start": torch.tensor([0, len(prefixes)]).int(),
        "positions": torch.arange(len(prefixes)),
        "params": params,
        "vocab_size": tiny.size,
        "draft_logprobs": log_q.gather(1, tokens.clamp(min=0)[:, None])[:, 0],
        "draft_logits": q,
        "draft_rows": torch.arange(len(prefixes)).int(),
        "draft_temperature": drafter.temperature,
    }


def outcomes(
    tiny: Tiny, params: SamplingTensors, drafter: SamplingTensors, rule: str
) -> tuple[dict[Any, float], float]:
    """Probability of every continuation that ``depth`` drafted tokens and their verdict commit, completed by the target
    to depth + 1 tokens; and the expected number of accepted tokens. By the reference's own functions.
    """
    reached: dict[tuple[int, ...], float] = {}
    expected, depth = 0.0, tiny.depth
    for path in itertools.product(range(tiny.size), repeat=depth):
        case = block_of(tiny, path, params, drafter, bonus=True)
        drawn = math.exp(case["draft_logprobs"][:depth].sum().item())
        if drawn == 0:
            continue
        rows = rows_of(case, 0)
        if rule == "block":
            weights, shares = block_shares(rows, 0, depth)
            ends = [math.prod(1 - share for share in shares[i:]) for i in range(depth + 1)]
            ends = [end * (shares[i - 1] if i else 1.0) for i, end in enumerate(ends)]
        else:
            weights, ratios = [1.0] * (depth + 1), [min(1.0, rows.ratio(row).item()) for row in range(depth)]
            ends = [math.prod(ratios[:i]) * (1 - ratios[i] if i < depth else 1.0) for i in range(depth + 1)]
        for held, share in enumerate(ends):
            expected += drawn * share * held
            residual = rows.residual(held, weights[held]) if held < depth else rows.log_p(held).exp()
            residual = residual.double() if residual.any() else rows.log_p(held).exp().double()
            for token, mass in enumerate((residual / residual.sum()).tolist()):
                key = (*path[:held], token)
                reached[key] = reached.get(key, 0.0) + drawn * share * mass
    complete: dict[tuple[int, ...], float] = {}
    for key, mass in reached.items():
        rest = {key: mass}
        for _ in range(depth + 1 - len(key)):
            rest = {(*k, t): m * p for k, m in rest.items() for t, p in enumerate(probabilities(tiny.p[k], params))}
        for k, m in rest.items():
            complete[k] = complete.get(k, 0.0) + m
    return complete, expected


SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "plain": ({}, 1.0),
    "hot draft": ({}, 1.8),
    "cold draft": ({"temperature": 1.2}, 0.5),
    "top-k": ({"top_k": 2}, 1.0),
    "top-p": ({"top_p": 0.8, "temperature": 0.9}, 1.3),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("vocab_size", "depth"), [(2, 4), (3, 3), (4, 2)])
def test_every_continuation_is_as_likely_as_the_targets(setting: str, vocab_size: int, depth: int) -> None:
    """And never fewer tokens are accepted than token by token; by far enough to see in most."""
    cut, draft_temperature = SETTINGS[setting]
    params, drafter = sampling(1, **cut), sampling(1, **{**cut, "temperature": draft_temperature})
    gains = []
    for seed in range(3):
        tiny = Tiny(vocab_size, 0.8, depth, seed)
        exact = tiny.joint(params, depth + 1)
        for rule in ("block", "rejection"):
            found, accepted = outcomes(tiny, params, drafter, rule)
            assert math.isclose(sum(found.values()), 1.0, abs_tol=1e-5)
            for key, mass in exact.items():
                assert math.isclose(found.get(key, 0.0), mass, abs_tol=1e-5), (rule, key)
            gains.append(accepted if rule == "block" else gains.pop() - accepted)
    assert min(gains) > -1e-6
    assert max(gains) > 1e-3


def wrong_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every prefix is accepted as if the block ended behind it."""
    monkeypatch.setattr(verification._Rows, "share", lambda self, row, weight, goes_on: weight)


def wrong_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replacements from max(p - q, 0), as if the tokens before had weight 1."""
    right = verification._Rows.residual
    monkeypatch.setattr(verification._Rows, "residual", lambda self, row, weight: right(self, row, 1.0))


@pytest.mark.parametrize("bug", [wrong_share, wrong_residual])
def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch, bug: Callable[[pytest.MonkeyPatch], None]) -> None:
    params, drafter, tiny = sampling(1), sampling(1, temperature=1.8), Tiny(3, 0.8, 3, 0)
    bug(monkeypatch)
    found, _ = outcomes(tiny, params, drafter, "block")
    assert max(abs(found.get(key, 0.0) - mass) for key, mass in tiny.joint(params, 4).items()) > 1e-3


def test_the_papers_example() -> None:
    """Section 1 of arXiv 2403.10444: two independent positions, 10/9 accepted token by token and 11/9 together."""
    tiny = Tiny(2, 0.0, 2, 0)
    for prefix in tiny.p:
        tiny.p[prefix], tiny.q[prefix] = torch.tensor([1 / 3, 2 / 3]).log(), torch.tensor([2 / 3, 1 / 3]).log()
    one = sampling(1)
    assert math.isclose(outcomes(tiny, one, one, "rejection")[1], 10 / 9, rel_tol=1e-5)
    assert math.isclose(outcomes(tiny, one, one, "block")[1], 11 / 9, rel_tol=1e-5)


@everyone
@pytest.mark.parametrize("bonus", [True, False])
def test_committed_tokens_have_the_targets_distribution(verify: Implementation, bonus: bool) -> None:
    """By the operator itself, for many seeds: the first two tokens, the second drawn from the target where it lacks."""
    n, size, depth = 600 if verify.function is reference.verify else 20000, 5, 3
    tiny, params = Tiny(size, 2.0, depth, 5), sampling(n, temperature=1.5)
    width = depth + bonus
    paths = torch.zeros((n, 0), dtype=torch.int64)
    logprobs = torch.zeros((n, 0))
    p_rows, q_rows = [], []
    drafter = SamplingTensors(params.temperature / 2, params.top_k, params.top_p, params.min_p, params.seed)
    for step in range(width):
        keys = [tuple(path) for path in paths.tolist()]
        p_rows.append(torch.stack([tiny.p[key] for key in keys]))
        q_rows.append(torch.stack([tiny.q[key] for key in keys]))
        drawn = reference.sample(q_rows[-1], drafter, torch.full((n,), step), size, Stream.DRAFT)
        paths, logprobs = (
            torch.cat((paths, drawn.tokens[:, None]), 1),
            torch.cat((logprobs, drawn.logprobs[:, None]), 1),
        )
    tokens = paths.clone()
    if bonus:
        tokens[:, -1] = -1
    accepted, next_token = verify(
        torch.stack(p_rows, 1).flatten(0, 1),
        tokens.flatten(),
        torch.arange(n + 1).int() * width,
        torch.arange(width).repeat(n),
        params,
        size,
        "block",
        logprobs.flatten(),
        torch.stack(q_rows, 1).flatten(0, 1),
        torch.arange(n * width).int(),
        drafter.temperature,
    )
    assert torch.equal(next_token < 0, (accepted == depth) & (not bonus))
    assert set(accepted.tolist()) == set(range(depth + 1))
    committed = [
        path[:held] + ([token] if token >= 0 else [])
        for path, held, token in zip(paths.tolist(), accepted.tolist(), next_token.tolist(), strict=True)
    ]
    second = torch.stack([tiny.p[(tokens[0],)] for tokens in committed])
    other = SamplingTensors(params.temperature, params.top_k, params.top_p, params.min_p, params.seed + n)
    drawn = reference.sample(second, other, torch.full((n,), 1), size).tokens.tolist()
    pairs = [((*tokens, extra)[0], (*tokens, extra)[1]) for tokens, extra in zip(committed, drawn, strict=True)]
    counts = torch.tensor([pairs.count(pair) for pair in itertools.product(range(size), repeat=2)])
    exact = torch.tensor(list(tiny.joint(params[torch.tensor([0])], 2).values()), dtype=torch.float64)
    assert_frequencies(counts, exact / exact.sum() * n)


@pytest.mark.parametrize("verify", [p for p in emulated("verify") if p.id == "cuda"])
def test_a_kernel_without_the_rule_refuses_it(verify: Implementation) -> None:
    """And the registry takes another."""
    case = one_row_each(torch.zeros(2, 9), sampling(2), torch.tensor([3, 0]))
    with pytest.raises(ValueError, match="kernel has the rules"):
        verify(**case, rule="block")
    assert cuda.refuses("verify", Situation("cuda", rule="block")) == "has no block verification"

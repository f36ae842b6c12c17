"""CUDA's verify where what it counts just fits, or just does not: lists of values, and the sizes of its workspace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_emu import build
from ops_support import sampling
from torch import Tensor
from verify_support import Case, assert_same, one_row_each, ragged

from pearl_kernels import SamplingTensors, reference
from pearl_kernels.reference import Rule, Stream, Verdict
from pearl_kernels.reference.philox import uniform
from pearl_kernels.reference.sampling import log_probabilities

pytestmark = build.on_linux

verify = build.operator("verify")
FITS = 2048  # values of a block's list, and values that are gathered
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def same_inputs_always() -> None:
    torch.manual_seed(5)


@pytest.mark.parametrize("cut", [{"top_k": FITS - 40}, {"top_p": 0.97}, {"top_k": FITS - 40, "top_p": 0.97}])
@pytest.mark.parametrize("count", [FITS - 1, FITS, FITS + 1, FITS + 2])
@pytest.mark.parametrize("above", [0, 1], ids=("all in one bin", "one in a bin before"))
def test_values_that_just_fit_into_lists(count: int, above: int, cut: dict[str, Any]) -> None:
    """``count`` values in one bin decide: the least likely kept token is known, and what mass the likeliest has."""
    vocab_size = count + above
    logits = torch.randperm(vocab_size).float()[None] * -1e-5
    if above:
        logits[0, 700] = 6.0  # the others' z is within (-6.03, -6], one bin; half of the mass is its
    logits, params = logits.expand(2, -1).contiguous(), sampling(2, 1.0, **cut)
    log_p = log_probabilities(logits, params, vocab_size)[0]
    kept = log_p > -torch.inf
    last = torch.where(kept, log_p, torch.inf).argmin()
    next_one = torch.where(kept, -torch.inf, logits[0]).argmax()
    surely = torch.full((2,), -100.0)
    case = one_row_each(logits, params, torch.stack((last, next_one)), draft_logprobs=surely)
    assert verify(**case).accepted.tolist() == [1, 0]

    likeliest = log_p.argmax().repeat(2)
    u = uniform(params.seed, torch.full((2,), 10), Stream.ACCEPT)
    even = log_p[likeliest].double() - u.double().log()
    case = one_row_each(logits, params, likeliest, draft_logprobs=(even + torch.tensor([-1e-4, 1e-4])).float())
    assert verify(**case).accepted.tolist() == [1, 0]


def rejected(rule: Rule, vocab_size: int) -> Case:
    """Requests that are cut, as their drafts are; the first drafted token of each is rejected under that rule."""
    case = ragged(rule, vocab_size, BF16, FP32, requests=8)
    case["draft_logprobs"] = case["draft_logprobs"] + 60.0
    return case | {"params": sampling(8, 0.8, top_k=50), "draft_temperature": torch.full((8,), 1.1)}


def with_params(case: Case, before: int, after: int) -> Case:
    """The case's requests after and before others, which are greedy."""

    def around(values: Tensor) -> Tensor:
        return torch.cat((values.new_zeros(before), values, values.new_zeros(after)))

    fields = SamplingTensors.__dataclass_fields__
    params = SamplingTensors(*(around(getattr(case["params"], field)) for field in fields))
    return case | {"params": params, "draft_temperature": around(case["draft_temperature"])}


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize("vocab_size", [300, 4200])
def test_requests_without_rows_may_be_more_than_there_are_rows(rule: Rule, vocab_size: int) -> None:
    """What is known of each request has its place in the workspace, though the rows are fewer. So many that, with room
    for as many histograms as there are rows, the last ones would lie over the lists of the same requests."""
    case = rejected(rule, vocab_size)
    expected, empty = verify(**case), 3 * len(case["draft_tokens"]) - 4
    wider = with_params(case, empty, 3)
    starts = case["row_start"]
    wider["row_start"] = torch.cat((starts.new_zeros(empty), starts, starts[-1:].expand(3)))
    none = torch.zeros(empty, dtype=torch.int32), torch.full((empty,), -1)
    accepted, next_token = (torch.cat((a, b, a[:3])) for a, b in zip(none, expected, strict=True))
    assert_same(verify(**wider), Verdict(accepted, next_token))


def test_rows_that_one_block_has_beside_drafts_that_several_share() -> None:
    """More than 256 rows, a few requests: only the drafts' histograms are in the workspace."""
    vocab_size, long = 4200, 256
    case = rejected("rejection", vocab_size)
    expected = verify(**case)
    wider = with_params(case, 0, 1)
    wider["row_start"] = torch.cat((case["row_start"], case["row_start"][-1:] + long))
    row = case["logits"][:1, :vocab_size]
    wider["logits"] = torch.cat((case["logits"][:, :vocab_size], row.expand(long, -1)))
    best = int(reference.sample(row, sampling(1, 0.0), torch.zeros(1).long(), vocab_size).tokens)
    fill = {"draft_tokens": best, "positions": 0, "draft_logprobs": 0.0, "draft_rows": -1}
    wider |= {k: torch.cat((case[k], torch.full((long,), value, dtype=case[k].dtype))) for k, value in fill.items()}
    held = torch.tensor([long], dtype=torch.int32), torch.tensor([-1])
    assert_same(verify(**wider), Verdict(*map(torch.cat, zip(expected, held, strict=True))))

"""The limits of CUDA's verify: rows that are no distributions or no request's, numbers out of range, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cuda_emu import build
from ops_support import padded_logits, sampling, strided_rows
from torch import Tensor
from verify_support import assert_same, one_row_each, ragged

from pearl_kernels import SamplingTensors
from pearl_kernels.cpu import OPERATORS as CPU
from pearl_kernels.reference import Rule, Verdict

pytestmark = build.on_linux

verify = build.operator("verify")
both_rules = pytest.mark.parametrize("rule", ["rejection", "coupled"])
FP32 = torch.float32
TILE = 8192  # tokens of a row that one block takes
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def same_inputs_always() -> None:
    torch.manual_seed(5)


@both_rules
@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("cut", [{}, {"top_k": 30}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.5}])
def test_rows_that_are_no_distributions(rule: Rule, temperature: float, cut: dict[str, Any]) -> None:
    """NaN is no token, and an infinite logit leaves nothing to draw; never is a token out of range."""
    vocab_size = TILE + 100
    logits = torch.randn(7, vocab_size)
    logits[0, 1::2] = NAN
    logits[1, :TILE] = NAN
    logits[2] = -INF
    logits[3, 8000] = INF
    logits[4, ::3] = -INF
    logits[5] = NAN
    logits[5, 77] = 1.0
    logits[6] = NAN
    tokens = torch.tensor([0, TILE + 1, 3, 8000, 1, 77, 2])
    q = {"draft_logits": logits.flip(0), "draft_rows": torch.arange(7).int(), "draft_temperature": torch.ones(7)}
    case = one_row_each(logits, sampling(7, temperature, **cut), tokens, **q) | {"rule": rule}
    accepted, next_token = verify(**case)
    assert ((next_token >= -1) & (next_token < vocab_size)).all()
    expected = CPU["verify"](**case)
    some = slice(0, 6)  # a row of NaNs alone is next
    assert_same(Verdict(accepted[some], next_token[some]), Verdict(expected.accepted[some], expected.next_token[some]))
    assert (accepted[6], next_token[6]) == (0, 0)


@both_rules
@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_rows_of_no_request_are_not_judged(rule: Rule, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = ragged(rule, 300, FP32, FP32, requests=8)
    before, after = 3, 4
    expected = verify(**case)
    monkeypatch.setenv("PEARL_EMU_ORDER", order)

    def with_others(rows: Tensor) -> Tensor:
        filler = torch.full((before + after, *rows.shape[1:]), -1 if rows.dtype.is_floating_point else 5)
        return torch.cat((filler[:before].to(rows.dtype), rows, filler[before:].to(rows.dtype)))

    wider = {k: with_others(case[k]) for k in ("draft_tokens", "positions", "draft_logprobs", "draft_rows")}
    wider["logits"] = strided_rows(with_others(case["logits"][:, :300]))
    wider["row_start"] = case["row_start"] + before
    assert_same(verify(**(case | wider)), expected)


def test_what_is_out_of_range_is_not_read() -> None:
    """Numbers on the device cannot be checked before the launch: a token past the vocabulary does not hold, and q from
    a row that does not exist, or without logits, is the point mass."""
    n, vocab_size = 6, 50
    logits = padded_logits(n, vocab_size, vocab_size, FP32, 0.0)
    tokens = torch.tensor([vocab_size, 2**40, 1, 2, 3, 4])
    surely = {"draft_logprobs": torch.full((n,), 60.0)}  # to be rejected
    case = one_row_each(logits, sampling(n), tokens, **surely)
    expected = verify(**case)
    assert expected.accepted.tolist() == [0] * n
    assert (expected.next_token != tokens).all()
    q = {"draft_logits": logits[:2], "draft_temperature": torch.ones(n)}
    q["draft_rows"] = torch.tensor([2, 2**31 - 1, 2, 77, 2, 3], dtype=torch.int32)
    assert_same(verify(**(case | q)), expected)
    assert_same(verify(**(case | {"draft_rows": torch.zeros(n, dtype=torch.int32)})), expected)
    certain = verify(**(case | {"draft_logprobs": None, "draft_rows": None}))
    zeros = {"draft_logprobs": torch.zeros(n)}
    assert_same(certain, verify(**(case | zeros)))


def arguments(**change: Any) -> tuple[Any, ...]:
    """The module's arguments for one greedy row, whose tensors live as long as the tuple's last entry is kept."""
    module = build.module("verify.cu")
    logits, params = torch.zeros(1, 16), sampling(1, 0.0)
    rows = {"draft_tokens": torch.tensor([-1]), "row_start": torch.tensor([0, 1]).int(), "positions": torch.tensor([3])}
    results = (torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    values = {
        "dtype": 0,
        "rows": 1,
        "stride": 16,
        "data": logits.data_ptr(),
        "requests": 1,
        "vocab_size": 16,
        "draft_logits": module.Logits(0, 0, 0, 0),
        "draft_temperature": 0,
    } | change
    view = module.Logits(values["data"], values["dtype"], values["rows"], values["stride"])
    drawn = module.Sampling(*(getattr(params, field).data_ptr() for field in SamplingTensors.__dataclass_fields__))
    addresses = [t.data_ptr() for t in rows.values()]
    sizes = (values["requests"], values["vocab_size"], False)
    draft = (0, values["draft_logits"], 0, values["draft_temperature"])
    return (view, drawn, *addresses, *sizes, *draft, *(t.data_ptr() for t in results)), (logits, params, rows, results)


def run(call: tuple[Any, ...], spare: int = 0, offset: int = 0) -> None:
    module = build.module("verify.cu")
    size = module.verify_workspace(*call, (0, 0))
    held = torch.empty(size + 64, dtype=torch.uint8)
    module.verify(*call, held.data_ptr() + offset, size + spare, (0, 0))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": 3},
        {"dtype": -1},
        {"rows": -1},
        {"rows": 70000},
        {"rows": 2, "stride": 15},
        {"data": 0},
        {"requests": -1},
        {"requests": 70000},
        {"vocab_size": 0},
        {"vocab_size": 2**23 + 1},
        {"draft_logits": (64, 5, 1, 16)},
        {"draft_logits": (64, 0, 1, 16)},  # without temperatures
        {"draft_logits": (64, 0, 2, 15), "draft_temperature": 64},
    ],
)
def test_what_cannot_be_run_is_refused(change: dict[str, Any]) -> None:
    if "draft_logits" in change:
        change = change | {"draft_logits": build.module("verify.cu").Logits(*change["draft_logits"])}
    call, _kept = arguments(**change)
    with pytest.raises(ValueError, match=r"^verify: CUDA error: invalid argument"):
        run(call)


def test_a_workspace_that_is_too_small_or_not_aligned_is_refused() -> None:
    call, _kept = arguments()
    run(call)
    for wrong in ({"spare": -1}, {"offset": 8}):
        with pytest.raises(ValueError, match=r"^verify: CUDA error: invalid argument"):
            run(call, **wrong)

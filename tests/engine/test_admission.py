"""What is admitted never fails in a round: parameters over arbitrary values, beside a request that must not notice."""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_requests import request_of
from engine_toy import VOCAB, Toy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pearl.admission import Admission, params_for
from pearl.errors import InvalidRequestError
from pearl.models.vocabulary import Vocabulary
from pearl.sampling_params import SamplingParams
from pearl_kernels import select

EOS = 1
NO_WORDS = Vocabulary({}, frozenset())
ADMISSION = Admission(SimpleNamespace(eos_ids={EOS}, vocabulary=NO_WORDS), VOCAB, 64)  # type: ignore[arg-type]
KERNELS = select()
BYSTANDER, BROUGHT = 1, 2

# Around every limit of Python, int32, fp16, fp32 and int64, and things that are no numbers at all.
_INTEGERS = [0, 1, -1, 2, 5, 20, 21, VOCAB - 1, VOCAB, 2**31 - 1, 2**31, 2**32, 2**63, 2**64 - 1, -(2**63), 10**400]
_FLOATS = [0.0, -0.0, 0.3, 1.0, 1.5, 2.0, 1e-5, 9e-6, 1e-30, 1e-38, 1e-45, 5e-324, 1e-100, 0.01, 100.0, 6e4, 1e5, 1e6]
_EDGES = [1e30, 3e38, 1e39, 1e308, math.inf, -math.inf, math.nan, 1 - 1e-9, 1 + 1e-9, 0.9999, -2.0, -1e4, -1e9, -1e39]
_THINGS = [
    None,
    True,
    False,
    "",
    "1",
    "<3",
    b"x",
    1j,
    Decimal(1),
    Fraction(1, 3),
    object(),
    np.bool_(1),
    [],
    {},
    [1],
    "",
]
_NUMPY = [
    np.int64(3),
    np.uint64(2**63),
    np.float16(0.5),
    np.float32(1e-40),
    np.float64(2),
    torch.tensor(1),
    np.array([2]),
]

scalars = st.one_of(st.sampled_from(_INTEGERS + _FLOATS + _EDGES + _THINGS + _NUMPY), st.floats(), st.integers())
tokens = st.one_of(st.integers(0, VOCAB - 1), scalars)
biases = st.dictionaries(st.one_of(st.integers(0, VOCAB - 1), st.sampled_from([*_INTEGERS, True, "5", 3.0])), scalars)
all_biased = scalars.map(lambda bias: dict.fromkeys(range(VOCAB), bias))
several = st.lists(tokens, max_size=3)
texts = st.one_of(scalars, st.lists(st.sampled_from(["<3>", "<", "><", "", 1, "x"]), max_size=3))
values = {
    "logit_bias": st.one_of(biases, all_biased, several, scalars),
    "stop": texts,
    "stop_token_ids": st.one_of(several, several.map(iter), st.just(range(VOCAB)), scalars),
}
number_fields = sorted(set(SamplingParams.__dataclass_fields__) - set(values))
fields = st.one_of(
    *(st.tuples(st.just(name), strategy) for name, strategy in values.items()),
    st.tuples(st.sampled_from(number_fields), scalars),
)
plausible = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 1e-5, 1e6]),
        "top_p": st.sampled_from([1.0, 0.9, 1e-50]),
        "top_k": st.sampled_from([0, 1, 2**40]),
        "min_tokens": st.sampled_from([0, 1, 3]),
        "repetition_penalty": st.sampled_from([1.0, 0.01, 100.0]),
    },
)


@settings(max_examples=80)
@given(plausible, st.lists(fields, min_size=1, max_size=2), st.sampled_from(["rejection", "coupled"]))
@example({}, [("logit_bias", dict.fromkeys(range(VOCAB), -math.inf))], "rejection")
@example({"temperature": 1.0}, [("logit_bias", dict.fromkeys(range(VOCAB), 10_000.0))], "rejection")
@example({"min_tokens": 3}, [("stop_token_ids", range(VOCAB))], "rejection")
@example({"temperature": 1.0}, [("temperature", 1e-45), ("draft_temperature", 3e38)], "rejection")
@example(
    {"temperature": 1.0, "repetition_penalty": 0.01}, [("temperature", 1e-5), ("draft_temperature", 1e6)], "coupled"
)
def test_admitted_parameters_never_fail_in_a_round(base: dict[str, Any], brought: Any, rule: Any) -> None:
    given_values = base | dict(brought)
    refusal = None
    try:
        params = SamplingParams(**given_values)
        ADMISSION.check(params)
    except InvalidRequestError as error:
        refusal = str(error)
    if refusal is not None:
        assert 20 < len(refusal) < 400
        return
    outputs = generated(params, rule)
    assert outputs[BYSTANDER] == alone(rule)
    assert 1 <= len(outputs[BROUGHT]) <= 4
    assert all(0 <= token < VOCAB for token in outputs[BROUGHT])
    banned = [token for token, bias in (params.logit_bias or {}).items() if bias == -math.inf]
    assert not set(banned) & set(outputs[BROUGHT])


def generated(params: SamplingParams | None, rule: Any) -> dict[int, list[int]]:
    """The tokens of a greedy request, and of one with these parameters beside it."""
    toy = Toy(rule=rule, num_pages=16, lanes=2, kernels=KERNELS)
    toy.engine.add(request_of(BYSTANDER, [3, 1, 2], 6, eos_ids=()))
    if params is not None:
        seed = 0 if params.seed is None else params.seed
        request = request_of(BROUGHT, [2, 7], min(4, params.max_tokens), params=params, eos_ids=(EOS,), seed=seed)
        toy.engine.add(request)
    outputs: dict[int, list[int]] = {BYSTANDER: [], BROUGHT: []}
    for _ in range(100):
        if not toy.engine.has_work:
            return outputs
        for delta in toy.engine.step():
            assert delta.error is None, delta.error
            outputs[delta.request_id] += delta.token_ids
    raise AssertionError("not finished after 100 rounds")


_ALONE: dict[str, list[int]] = {}


def alone(rule: Any) -> list[int]:
    if rule not in _ALONE:
        _ALONE[rule] = generated(None, rule)[BYSTANDER]
    return _ALONE[rule]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 9e-6])
def test_a_temperature_that_fp32_cannot_divide_by_is_greedy(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=4, stop_token_ids=())
    assert generated(params, "rejection") == generated(SamplingParams(max_tokens=4), "rejection")


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"logit_bias": {VOCAB: 1.0}}, rf"logit_bias names token {VOCAB}, outside the vocabulary \[0, {VOCAB}\)"),
        ({"stop_token_ids": [-1]}, "stop_token_ids names token -1"),
        ({"logit_bias": dict.fromkeys(range(VOCAB), -math.inf)}, "ban every token; leave at least one"),
        (
            {"logit_bias": dict.fromkeys(range(1, VOCAB), -1e9), "stop_token_ids": [0], "min_tokens": 2},
            "ban every token",
        ),
        ({"logit_bias": {t: -math.inf for t in range(VOCAB) if t != EOS}, "min_tokens": 2}, "ban every token"),
    ],
)
def test_parameters_that_the_vocabulary_cannot_serve(params: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        ADMISSION.check(SamplingParams(**params))


def test_one_token_that_is_left_is_chosen() -> None:
    params = SamplingParams(temperature=1.0, logit_bias={t: -math.inf for t in range(VOCAB) if t != 7})
    ADMISSION.check(params)
    assert generated(params, "rejection")[BROUGHT] == [7] * 4


def test_more_alternatives_than_tokens_are_refused() -> None:
    small = Admission(SimpleNamespace(eos_ids=frozenset(), vocabulary=NO_WORDS), 10, 64)  # type: ignore[arg-type]
    small.check(SamplingParams(logprobs=10))
    with pytest.raises(InvalidRequestError, match="logprobs=11, but the vocabulary has 10 tokens"):
        small.check(SamplingParams(logprobs=11))


def test_ids_outside_the_vocabulary_are_named_with_their_place() -> None:
    assert ADMISSION.encode_all([[0, VOCAB - 1], np.array([5])]) == [[0, VOCAB - 1], [5]]
    with pytest.raises(
        InvalidRequestError, match=rf"^the prompt has token {VOCAB}, outside the vocabulary .*, at position 1$"
    ):
        ADMISSION.encode_all([[0, VOCAB]])
    with pytest.raises(
        InvalidRequestError, match=r"^prompts\[1\]: the prompt has token -3, outside .*, at position 0$"
    ):
        ADMISSION.encode_all([[0], [-3, VOCAB]])
    with pytest.raises(InvalidRequestError, match=r"token a value of type int, outside .*, at position 0$"):
        ADMISSION.encode([10**5000])


A, B = SamplingParams(), SamplingParams(temperature=1.0)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(None, [A, A]), (B, [B, B]), ([A, B], [A, B]), ((A, B), [A, B]), (iter([A, B]), [A, B])],
)
def test_parameters_are_one_for_all_or_one_for_each(given: Any, wanted: list[SamplingParams]) -> None:
    assert params_for(2, given) == wanted


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": 1.0}, r"not \{'temperature': 1.0\}; SamplingParams.from_mapping makes them from a dict"),
        ("greedy", "params must be SamplingParams, or one for each prompt, not 'greedy'"),
        (0.7, "not 0.7"),
        ([A, {"n": 1}], r"params\[1\] must be SamplingParams, not \{'n': 1\}"),
        ([A, None], r"params\[1\] must be SamplingParams, not None"),
        ([A], "2 prompts but 1 SamplingParams"),
        (itertools.repeat(A), "params must be SamplingParams, or one for each prompt"),
    ],
)
def test_anything_else_is_refused(given: Any, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        params_for(2, given)

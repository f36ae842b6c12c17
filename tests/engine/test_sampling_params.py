"""Sampling parameters: what is refused, and that the refusal says what to do."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from engine_requests import sequence_state

from pearl.errors import InvalidRequestError, PearlError
from pearl.sampling_batch import SamplingBatches, draft_temperature
from pearl.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("temperature", -0.1, "0 decodes greedily"),
        ("temperature", math.nan, "finite number >= 0"),
        ("temperature", math.inf, "finite number >= 0"),
        ("draft_temperature", -1.0, "finite number >= 0"),
        ("top_k", -1, "0 (off) or the number of tokens to keep"),
        ("top_p", 0.0, "in (0, 1]; 1 turns it off"),
        ("top_p", 1.01, "in (0, 1]; 1 turns it off"),
        ("top_p", math.nan, "in (0, 1]"),
        ("min_p", -0.1, "in [0, 1]; 0 turns it off"),
        ("min_p", 1.1, "in [0, 1]; 0 turns it off"),
        ("repetition_penalty", 0.0, "in [0.01, 100]; 1 turns it off"),
        ("repetition_penalty", math.inf, "in [0.01, 100]; 1 turns it off"),
        ("presence_penalty", 2.1, "in [-2, 2]; 0 turns it off"),
        ("frequency_penalty", -2.1, "in [-2, 2]; 0 turns it off"),
        ("max_tokens", 0, "at least 1"),
        ("min_tokens", -1, "between 0 and max_tokens"),
        ("min_tokens", 129, "between 0 and max_tokens"),
        ("seed", 2**64, "a 64-bit integer"),
        ("seed", -(2**63) - 1, "a 64-bit integer"),
        ("logprobs", -1, "None or between 0 and 20"),
        ("logprobs", 21, "None or between 0 and 20"),
        ("n", 0, "at least 1"),
        ("n", 10**9, "at most 16384"),
        ("stop", "", "without empty strings"),
        ("stop", ["a", ""], "without empty strings"),
        # Of the wrong type
        ("temperature", "0.7", "finite number >= 0"),
        ("temperature", True, "finite number >= 0"),
        ("temperature", 1j, "finite number >= 0"),
        ("temperature", Decimal("0.7"), "finite number >= 0"),
        ("temperature", None, "finite number >= 0"),
        ("draft_temperature", [1.0], "finite number >= 0"),
        ("top_p", "1", "in (0, 1]"),
        ("top_k", 1.5, "number of tokens to keep"),
        ("top_k", None, "number of tokens to keep"),
        ("max_tokens", math.inf, "an integer, at least 1"),
        ("max_tokens", "10", "an integer, at least 1"),
        ("max_tokens", True, "an integer, at least 1"),
        ("seed", 1.5, "a 64-bit integer"),
        ("seed", False, "a 64-bit integer"),
        ("logprobs", True, "None or between 0 and 20"),
        ("logprobs", 2.5, "None or between 0 and 20"),
        ("n", np.bool_(True), "an integer"),
        ("ignore_eos", 1, "True or False"),
        ("ignore_eos", "no", "True or False"),
        ("stop", [1], "a text or several texts"),
        ("stop", b"x", "a text or several texts"),
        ("stop", {"a": 1}, "a text or several texts"),
        ("stop", 5, "a text or several texts"),
        ("stop_token_ids", 5, "a list of token ids"),
        ("stop_token_ids", ["5"], "a list of token ids"),
        ("stop_token_ids", [True], "a list of token ids"),
        ("stop_token_ids", "12", "a list of token ids"),
        ("stop_token_ids", itertools.count(), "a list of token ids"),
        ("logit_bias", [5], "a mapping from token ids"),
        ("logit_bias", {5: "1"}, "a mapping from token ids"),
        ("logit_bias", {5: None}, "a mapping from token ids"),
        ("logit_bias", {True: 1.0}, "a mapping from token ids"),
        ("logit_bias", {"5": 1.0}, "a mapping from token ids"),
        ("logit_bias", {5: math.nan}, "at most 10000 each"),
        ("logit_bias", {5: math.inf}, "at most 10000 each"),
        ("logit_bias", {5: 1e5}, "at most 10000 each"),
    ],
)
def test_bad_value_is_refused_by_name_with_the_value_and_what_to_do(name: str, value: Any, advice: str) -> None:
    with pytest.raises(InvalidRequestError) as error:
        SamplingParams(**{name: value})
    message = str(error.value)
    assert message.startswith(name)
    assert advice in message
    assert repr(value) in message


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0},
        {"temperature": 5.0, "top_p": 1e-6, "min_p": 1.0, "top_k": 1},
        {"presence_penalty": 2, "frequency_penalty": -2, "repetition_penalty": 0.5},
        {"max_tokens": 1, "min_tokens": 1, "logprobs": 0, "n": 3},
        {"seed": 2**64 - 1, "draft_temperature": 0.0},
        {"seed": -(2**63), "logprobs": 20},
    ],
)
def test_the_edges_of_every_range_are_allowed(values: dict[str, Any]) -> None:
    SamplingParams(**values)


@pytest.mark.parametrize(
    "value", [10**5000, [10**5000], "x" * 10**6, range(10**9)], ids=["digits", "in a list", "long", "range"]
)
def test_a_refusal_is_one_short_sentence_whatever_was_given(value: Any) -> None:
    for name in ("temperature", "logprobs", "ignore_eos", "logit_bias"):
        with pytest.raises(InvalidRequestError, match=f"^{name} must be .*; got ") as error:
            SamplingParams(**{name: value})
        assert len(str(error.value)) < 300


def test_a_list_of_stops_that_would_slow_every_round_is_refused() -> None:
    SamplingParams(stop=[str(i) for i in range(1024)])
    with pytest.raises(InvalidRequestError, match="stop must be at most 1024 texts"):
        SamplingParams(stop=[str(i) for i in range(1025)])


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("max_tokens", 10.0, 10),
        ("max_tokens", np.int64(10), 10),
        ("max_tokens", np.float32(10), 10),
        ("top_k", np.uint8(3), 3),
        ("top_k", 2**31, 2**31 - 1),  # more than any vocabulary: off
        ("seed", np.uint64(2**64 - 1), 2**64 - 1),
        ("seed", 1.0, 1),
        ("logprobs", np.int8(2), 2),
        ("n", 2.0, 2),
        ("temperature", 1, 1.0),
        ("temperature", np.float16(0.5), 0.5),
        ("temperature", Fraction(1, 4), 0.25),
        ("temperature", 9e-6, 0.0),  # fp32 would overflow further below: greedy
        ("temperature", 5e-324, 0.0),
        ("temperature", 1e-5, 1e-5),
        ("draft_temperature", 1e-38, 0.0),
        ("top_p", 1e-50, 1e-7),  # 0 in fp32, which keeps nothing
        ("ignore_eos", np.bool_(True), True),
        ("stop", "ab", ("ab",)),
        ("stop", ["a", "b"], ("a", "b")),
        ("stop", (c for c in "ab"), ("a", "b")),
        ("stop_token_ids", (i for i in (3, 4.0)), (3, 4)),
        ("stop_token_ids", np.array([3, 4]), (3, 4)),
        ("stop_token_ids", torch.tensor([3, 4]), (3, 4)),
        ("logit_bias", {np.int64(5): 1, 6.0: np.float32(-2), 7: -1e9}, {5: 1.0, 6: -2.0, 7: -math.inf}),
        ("logit_bias", MappingProxyType({5: -math.inf}), {5: -math.inf}),
    ],
)
def test_what_is_meant_becomes_pythons_own_value(name: str, value: Any, wanted: Any) -> None:
    params = SamplingParams(**{name: value})
    held = getattr(params, name)
    assert held == wanted
    assert not isinstance(wanted, (int, float)) or type(held) is type(wanted)
    assert params == SamplingParams(**{name: wanted})
    assert hash(params) == hash(SamplingParams(**{name: wanted}))


def test_what_was_checked_cannot_change_afterwards() -> None:
    biases, stops, ids = {5: 1.0}, ["a"], [7]
    params = SamplingParams(logit_bias=biases, stop=stops, stop_token_ids=ids)
    biases[6] = "x"  # type: ignore[assignment]
    stops.append(b"x")  # type: ignore[arg-type]
    ids.append(True)
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({5: 1.0}, ("a",), (7,))
    held: Any = params.logit_bias
    for change in (lambda: held.update({6: 1}), lambda: held.__setitem__(6, 1), held.clear, lambda: held.pop(5)):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    for copied in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), dataclasses.replace(params)):
        assert copied == params


def test_unknown_parameter_names_itself_and_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"unknown sampling parameters \['temprature'\].*'temperature'"):
        SamplingParams.from_mapping({"temprature": 1.0})
    with pytest.raises(InvalidRequestError, match="did you mean 'temperature'"):
        SamplingParams.from_mapping({"temprature": 1.0, 5: 1})  # type: ignore[dict-item]
    with pytest.raises(InvalidRequestError, match="mapping from names to values, not 'hot'"):
        SamplingParams.from_mapping("hot")  # type: ignore[arg-type]
    assert SamplingParams.from_mapping({"temperature": 1.0}) == SamplingParams(temperature=1.0)


def test_refusals_are_value_errors_that_a_caller_can_catch_as_pearls() -> None:
    assert issubclass(InvalidRequestError, ValueError)
    assert issubclass(InvalidRequestError, PearlError)


@pytest.mark.parametrize(("stop", "strings"), [(None, ()), ("ab", ("ab",)), (["a", "b"], ("a", "b"))])
def test_stop_is_one_text_or_several(stop: Any, strings: tuple[str, ...]) -> None:
    assert SamplingParams(stop=stop).stop_strings == strings


@pytest.mark.parametrize(
    "values",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": -0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 2},
    ],
)
def test_what_depends_on_the_text_is_marked_as_such(values: dict[str, Any]) -> None:
    assert SamplingParams(**values).changes_logits
    plain = SamplingParams(temperature=0.7, top_k=3, top_p=0.5, min_p=0.1, logit_bias={}, stop="x", logprobs=2)
    assert not plain.changes_logits


def test_draft_temperature_defaults_to_the_requests_own() -> None:
    assert draft_temperature(SamplingParams(temperature=0.7)) == 0.7
    assert draft_temperature(SamplingParams(temperature=0.7, draft_temperature=0.0)) == 0.0


def test_tensors_hold_one_entry_for_each_sequence_in_order() -> None:
    states = [
        sequence_state(SamplingParams(temperature=0.5, top_k=7, draft_temperature=0.25)),
        sequence_state(SamplingParams(top_p=0.9, min_p=0.1)),
    ]
    tensors = SamplingBatches(torch.device("cpu")).tensors(states)
    assert tensors.temperature.tolist() == [0.5, 0.0]
    assert tensors.top_k.tolist() == [7, 0]
    assert tensors.top_p.tolist() == pytest.approx([1.0, 0.9])
    assert tensors.min_p.tolist() == pytest.approx([0.0, 0.1])
    assert SamplingBatches(torch.device("cpu"), for_draft=True).tensors(states).temperature.tolist() == [0.25, 0.0]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1, -(2**63)])
def test_every_seed_keeps_its_64_bits(seed: int) -> None:
    state = dataclasses.replace(sequence_state(SamplingParams()), seed=seed)
    (held,) = SamplingBatches(torch.device("cpu")).tensors([state]).seed.tolist()
    assert held % 2**64 == seed % 2**64


def test_tensors_are_made_again_only_for_another_batch() -> None:
    batches = SamplingBatches(torch.device("cpu"))
    first = sequence_state(SamplingParams(temperature=0.5))
    made = batches.tensors([first])
    assert batches.tensors([dataclasses.replace(first, lane=3)]) is made  # nothing that the tensors hold
    for other in ([dataclasses.replace(first, seed=9)], [first, first], [sequence_state(SamplingParams(top_k=2))]):
        fresh = batches.tensors(other)
        assert fresh is not made
        assert fresh.seed.tolist() == [state.seed for state in other]
        assert fresh.top_k.tolist() == [state.params.top_k for state in other]

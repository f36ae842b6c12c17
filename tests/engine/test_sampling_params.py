"""Sampling parameters: what is refused, and that the refusal says what to do."""

from __future__ import annotations

import math
from typing import Any

import pytest

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
        ("repetition_penalty", 0.0, "> 0; 1 turns it off"),
        ("repetition_penalty", math.inf, "> 0; 1 turns it off"),
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
        ("stop", "", "without empty strings"),
        ("stop", ["a", ""], "without empty strings"),
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


def test_unknown_parameter_names_itself_and_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"unknown sampling parameters \['temprature'\].*'temperature'"):
        SamplingParams.from_mapping({"temprature": 1.0})
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
    import torch
    from engine_sim import sequence_state

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
    import dataclasses

    import torch
    from engine_sim import sequence_state

    state = dataclasses.replace(sequence_state(SamplingParams()), seed=seed)
    (held,) = SamplingBatches(torch.device("cpu")).tensors([state]).seed.tolist()
    assert held % 2**64 == seed % 2**64


def test_tensors_are_made_again_only_for_another_batch() -> None:
    import dataclasses

    import torch
    from engine_sim import sequence_state

    batches = SamplingBatches(torch.device("cpu"))
    first = sequence_state(SamplingParams(temperature=0.5))
    made = batches.tensors([first])
    assert batches.tensors([dataclasses.replace(first, lane=3)]) is made  # nothing that the tensors hold
    for other in ([dataclasses.replace(first, seed=9)], [first, first], [sequence_state(SamplingParams(top_k=2))]):
        fresh = batches.tensors(other)
        assert fresh is not made
        assert fresh.seed.tolist() == [state.seed for state in other]
        assert fresh.top_k.tolist() == [state.params.top_k for state in other]

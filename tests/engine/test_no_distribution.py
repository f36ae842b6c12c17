"""Rows from which nothing can be drawn: the request ends with a sentence, the others have their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_toy import VOCAB, Toy, ToyRunner
from torch import Tensor

from pearl.sampling_params import SamplingParams
from pearl_kernels import select

PROMPTS = ([1, 2, 3], [4, 5], [6])
SICK = 1  # the prompt whose logits fail once five tokens are known
GREEDY = SamplingParams(max_tokens=20)
SAMPLED = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9)


class SickRunner(ToyRunner):
    value = torch.nan

    def logits(self, prefix: Sequence[int]) -> Tensor:
        row = super().logits(prefix)
        if prefix[0] == PROMPTS[SICK][0] and len(prefix) >= 5:
            row[:VOCAB] = self.value
        return row


def toy(method: str, rule: Any, value: float, models: Sequence[str]) -> Toy:
    """The named models are sick; with the kernels that CPUs run."""
    built = Toy(method, rule, kernels=select())
    for name in models:
        runner = getattr(built, name)
        runner.__class__ = SickRunner
        runner.value = value
    return built


@pytest.mark.parametrize("method", ["autoregressive", "pearl", "speculative"])
@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=("greedy", "sampled"))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_target_that_breaks_ends_its_request_alone(
    method: str, rule: Any, params: SamplingParams, value: float
) -> None:
    healthy, _ = Toy(method, rule, kernels=select()).run(PROMPTS, [params] * 3)
    outputs, errors = toy(method, rule, value, ["target", "draft"]).run(PROMPTS, [params] * 3)
    assert [outputs[0], outputs[2]] == [healthy[0], healthy[2]]
    assert outputs[SICK] == healthy[SICK][: len(outputs[SICK])]
    assert len(outputs[SICK]) <= 3
    assert [error is None for error in errors] == [True, False, True]
    assert errors[SICK] is not None
    assert "logits are NaN or infinite" in errors[SICK]


@pytest.mark.parametrize("method", ["pearl", "speculative"])
@pytest.mark.parametrize("models", [["target", "draft"], ["draft"]], ids=("target", "draft"))
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_breaks_in_a_block_harms_nobody_else(method: str, models: list[str], value: float) -> None:
    """What a block commits before a broken row depends on where it ends: it is no healthy output's beginning."""
    healthy, _ = Toy(method, "block", kernels=select()).run(PROMPTS, [SAMPLED] * 3)
    outputs, errors = toy(method, "block", value, models).run(PROMPTS, [SAMPLED] * 3)
    assert [outputs[0], outputs[2]] == [healthy[0], healthy[2]]
    ends = "target" in models
    assert [error is None for error in errors] == [True, not ends, True]
    assert len(outputs[SICK]) <= 3 if ends else len(outputs[SICK]) == 20


@pytest.mark.parametrize("method", ["pearl", "speculative"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=("greedy", "sampled"))
def test_a_draft_that_breaks_costs_speed_only(method: str, params: SamplingParams) -> None:
    outputs, errors = toy(method, "coupled", torch.nan, ["draft"]).run(PROMPTS, [params] * 3)
    assert errors == [None] * 3
    assert outputs == Toy(method, "coupled", kernels=select()).run(PROMPTS, [params] * 3)[0]
    rejection, errors = toy(method, "rejection", torch.nan, ["draft"]).run(PROMPTS, [params] * 3)
    assert errors == [None] * 3
    assert len(rejection[SICK]) == 20


@pytest.mark.parametrize("method", ["autoregressive", "pearl"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banning_every_token_is_an_error(method: str, temperature: float) -> None:
    banning = SamplingParams(temperature=temperature, logit_bias=dict.fromkeys(range(VOCAB), -torch.inf))
    plain = SamplingParams(max_tokens=10)
    outputs, errors = Toy(method).run(PROMPTS[:2], [banning, plain])
    assert outputs == [[], Toy(method).run(PROMPTS[1:2], [plain])[0][0]]
    assert errors[0] is not None
    assert "no token is left to draw" in errors[0]
    assert errors[1] is None


def test_token_0_is_a_token_like_others() -> None:
    """It is only looked at more closely."""
    only = SamplingParams(max_tokens=5, logit_bias=dict.fromkeys(range(1, VOCAB), -torch.inf))
    assert Toy("pearl").run([[1]], [only]) == ([[0] * 5], [None])

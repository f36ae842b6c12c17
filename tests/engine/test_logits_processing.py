"""Penalties, bias and minimum length, against transformers and the formulas of the docstring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_requests import sequence_state
from torch import Tensor
from transformers import MinNewTokensLengthLogitsProcessor, RepetitionPenaltyLogitsProcessor

from pearl.engine.logits_processing import process_row, process_rows
from pearl.sampling_params import SamplingParams

V = 32
EOS_IDS = (30, 31)
HISTORY = [5, 6, 5, 7, 8, 8, 8, 5]  # four prompt tokens, then output
PROMPT_LENGTH = 4


@pytest.fixture
def row() -> Tensor:
    return torch.randn(V, generator=torch.Generator().manual_seed(0)) * 3


def processed(
    row: Tensor, history: Sequence[int] = HISTORY, prompt_length: int = PROMPT_LENGTH, **params: Any
) -> Tensor:
    result = row.clone()
    state = sequence_state(SamplingParams(**params), history, prompt_length)
    process_row(result, state, history, EOS_IDS)
    return result


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_repetition_penalty_is_that_of_transformers(row: Tensor, penalty: float) -> None:
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([HISTORY]), row[None].clone())[0]
    assert (row[HISTORY] > 0).any()
    assert (row[HISTORY] < 0).any()
    torch.testing.assert_close(processed(row, repetition_penalty=penalty), expected, rtol=0, atol=0)


def test_presence_penalty_counts_each_output_token_once_and_no_prompt_token(row: Tensor) -> None:
    expected = row.clone()
    expected[[8, 5]] -= 0.6
    torch.testing.assert_close(processed(row, presence_penalty=0.6), expected)


def test_frequency_penalty_counts_every_occurrence_in_the_output(row: Tensor) -> None:
    expected = row.clone()
    expected[8] -= 3 * 0.5
    expected[5] -= 0.5
    torch.testing.assert_close(processed(row, frequency_penalty=0.5), expected)


def test_penalties_add_up(row: Tensor) -> None:
    expected = row.clone()
    expected[8] -= -0.2 + 3 * 0.5
    expected[5] -= -0.2 + 0.5
    torch.testing.assert_close(processed(row, presence_penalty=-0.2, frequency_penalty=0.5), expected)


def test_no_output_yet_means_no_presence_or_frequency_penalty(row: Tensor) -> None:
    for history in ([1, 2, 3, 4], [1]):
        changed = processed(row, history, len(history), presence_penalty=1.0, frequency_penalty=1.0)
        assert torch.equal(changed, row)


def test_bias_is_added_to_its_tokens_only(row: Tensor) -> None:
    expected = row.clone()
    expected[3] += 4.0
    expected[9] += -100.0
    torch.testing.assert_close(processed(row, logit_bias={3: 4.0, 9: -100.0}), expected)


@pytest.mark.parametrize(("min_tokens", "banned"), [(1, False), (3, False), (4, False), (5, True), (6, True)])
def test_end_tokens_are_impossible_among_the_first_min_tokens(row: Tensor, min_tokens: int, banned: bool) -> None:
    """Four tokens are out: the next is the fifth, which a minimum of four allows to be the end."""
    changed = processed(row, min_tokens=min_tokens, stop_token_ids=[7])
    assert (changed == -torch.inf).nonzero().flatten().tolist() == ([7, 30, 31] if banned else [])
    reference = MinNewTokensLengthLogitsProcessor(PROMPT_LENGTH, min_tokens, [7, *EOS_IDS], device="cpu")
    assert torch.equal(changed, reference(torch.tensor([HISTORY]), row[None].clone())[0])


def test_ignored_eos_is_not_banned(row: Tensor) -> None:
    assert torch.equal(processed(row, min_tokens=100, ignore_eos=True), row)
    changed = processed(row, min_tokens=100, ignore_eos=True, stop_token_ids=[7])
    assert (changed == -torch.inf).nonzero().flatten().tolist() == [7]


def test_each_row_of_a_window_sees_the_tokens_before_it() -> None:
    """What a verification does at once equals what autoregressive decoding does token by token."""
    committed, continuation = HISTORY[:6], [8, 5, 9]
    rows = torch.randn(4, V, generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {2: 1.0},
        "min_tokens": 5,
    }
    expected = torch.stack([processed(rows[i], committed + continuation[:i], **settings) for i in range(4)])
    state = sequence_state(SamplingParams(**settings), [*HISTORY[:6], 8, 5], PROMPT_LENGTH)  # 8 and 5 are pending
    process_rows(rows, state, continuation, EOS_IDS, len(committed))
    assert torch.equal(rows, expected)

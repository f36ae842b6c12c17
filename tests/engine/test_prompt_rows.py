"""Which rows of a prompt's logits are wanted of a forward, what is known after it, and in what pieces it is found."""

from __future__ import annotations

import math

import pytest
import torch
from engine_requests import request_of, sequence_state

from pearl.engine import prompt_logprobs
from pearl.engine.prompt_logprobs import PromptProgress, find_prompts
from pearl.errors import RoundError
from pearl.messages import ForwardWork, FoundPrompt, PromptRows, TokenLogprobs
from pearl.sampling_params import SamplingParams

PROMPT = (10, 11, 12, 13, 14, 15)


def found(*logprobs: float) -> FoundPrompt:
    return FoundPrompt(len(logprobs), lambda: tuple(TokenLogprobs(value, ()) for value in logprobs))


def test_a_row_judges_the_next_token_also_that_of_the_next_chunk() -> None:
    progress = PromptProgress(PROMPT, 2)
    assert (progress.missing, progress.first_row) == (5, 0)
    assert progress.wanted(7, 0, 3) == PromptRows(7, (11, 12, 13), 2)
    assert progress.wanted(7, 0, 6) == PromptRows(7, PROMPT[1:], 2)  # the last row judges no token of the prompt
    assert progress.wanted(7, 5, 9) is None


def test_what_is_known_is_not_wanted_again_from_wherever_the_target_begins() -> None:
    progress = PromptProgress(PROMPT, 0)
    progress.add(found(-1.0, -2.0, -3.0))
    assert (progress.missing, progress.first_row) == (2, 3)
    for start in (0, 1, 3):
        assert progress.wanted(1, start, 5) == PromptRows(1, (14, 15), 0)
    assert progress.wanted(1, 0, 3) is None
    progress.add(found(-4.0, -5.0))
    assert progress.missing == 0
    assert progress.wanted(1, 0, 6) is None
    entries = progress.take()
    assert entries is not None
    assert [entry and entry.logprob for entry in entries] == [None, -1.0, -2.0, -3.0, -4.0, -5.0]
    assert progress.take() is None


def test_the_prefix_cache_is_read_up_to_the_first_row_that_is_wanted() -> None:
    request = request_of(1, PROMPT)
    assert list(request.reusable) == list(PROMPT)
    request.prompt_logprobs = progress = PromptProgress(PROMPT, 0)
    # All but the last of them may be cached: so the row at position 0, then that at position 3, is computed.
    assert list(request.reusable) == [10]
    progress.add(found(-1.0, -2.0, -3.0))
    assert list(request.reusable) == [10, 11, 12, 13]
    progress.add(found(-4.0, -5.0))
    assert list(request.reusable) == list(PROMPT)


def test_what_is_no_number_is_an_error_and_one_token_is_nothing_to_tell() -> None:
    progress = PromptProgress(PROMPT[:3], 0)
    progress.add(found(-1.0, math.nan))
    with pytest.raises(RoundError, match="NaN"):
        progress.take()
    alone = PromptProgress(PROMPT[:1], 0)
    assert alone.missing == 0
    assert alone.take() == (None,)


@pytest.mark.parametrize("rows_of_a_piece", [1, 2, 5, 100])
def test_rows_are_found_in_pieces_among_those_of_verdicts(
    monkeypatch: pytest.MonkeyPatch, rows_of_a_piece: int
) -> None:
    vocab = 9
    monkeypatch.setattr(prompt_logprobs, "_PIECE_BYTES", 4 * vocab * rows_of_a_piece)
    logits = torch.randn(14, vocab + 2, generator=torch.Generator().manual_seed(0))
    counts = {1: (5, 3), 2: (0, 2), 3: (4, 0)}  # rows of the prompt, and of the verdict
    work, prompts = [], []
    for request_id, (of_prompt, judged) in counts.items():
        state = sequence_state(SamplingParams())
        state = type(state)(request_id, 0, state.params, 0, 1, None)
        work.append(ForwardWork(state, (0,) * (of_prompt + judged), 0, of_prompt + judged, ()))
        if of_prompt:
            prompts.append(PromptRows(request_id, tuple(range(of_prompt)), request_id))
    told, rest = find_prompts(logits, work, prompts, vocab)
    assert torch.equal(rest, logits[[5, 6, 7, 8, 9]])
    assert {request_id: one.size for request_id, one in told.items()} == {1: 5, 3: 4}
    expected = logits[:, :vocab].log_softmax(-1)
    for request_id, first in ((1, 0), (3, 10)):
        entries = told[request_id].entries()
        assert len(entries) == told[request_id].size
        for token, entry in enumerate(entries):
            row = expected[first + token]
            assert entry.logprob == row[token].item()
            assert [value for _, value in entry.top] == row.topk(request_id).values.tolist()

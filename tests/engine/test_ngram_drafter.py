"""Prompt lookup: what followed the last occurrence of the text's final n-gram."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from engine_requests import sequence_state
from hypothesis import given
from hypothesis import strategies as st

from pearl.drafting import NGramDrafter
from pearl.messages import DraftPlan, DraftWork, ForwardWork
from pearl.sampling_params import SamplingParams


def propose(history: Sequence[int], count: int, longest: int = 4, shortest: int = 1) -> list[int]:
    state = sequence_state(SamplingParams(), history)
    plan = DraftPlan((DraftWork(ForwardWork(state, (), 0, 1, ()), count),))
    proposal = NGramDrafter(longest, shortest).propose(plan)
    window = proposal.windows[state.request_id]
    assert all((d.logprob, d.row) == (0.0, -1) for d in window)  # a point mass: q(token) = 1
    assert proposal.logits is None
    assert proposal.steps == 0
    return [d.token for d in window]


@pytest.mark.parametrize(
    ("history", "count", "window"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 2, [9, 1]),
        ([1, 2, 3, 9, 1, 2, 3], 9, [9, 1, 2, 3, 9, 1, 2, 3, 9]),  # on into what it drafts
        ([7, 1, 2, 8, 1, 2, 3, 8, 1, 2], 2, [3, 8]),
        ([5, 1, 2, 7, 3, 1, 2, 3, 9, 5, 1], 3, [2, 7, 3]),  # what continues the first match
        ([5, 1, 2, 7, 3, 1, 2, 3, 9, 1], 2, [2, 3]),
        ([7, 1, 8, 1, 9, 1], 1, [9]),  # the last occurrence, not the first
        ([1, 2, 5, 3, 2, 6, 1, 2], 1, [5]),  # the longer match wins over the more recent one
        ([4, 4, 4], 3, [4, 4, 4]),  # overlapping with itself
        ([4, 4], 3, [4, 4, 4]),
        ([1, 2, 3], 3, []),
        ([1], 3, []),
        ([], 3, []),
    ],
)
def test_window_follows_the_last_longest_match(history: list[int], count: int, window: list[int]) -> None:
    assert propose(history, count) == window


def test_shortest_match_length_is_respected() -> None:
    assert propose([1, 5, 2, 1], 1, shortest=1) == [5]
    assert propose([1, 5, 2, 1], 1, shortest=2) == []


def test_longest_match_length_is_respected() -> None:
    history = [1, 2, 3, 7, 9, 2, 3, 8, 1, 2, 3]
    assert propose(history, 1, longest=3) == [7]
    assert propose(history, 1, longest=2) == [8]


def looked_up(history: list[int], longest: int, shortest: int) -> list[int]:
    """The definition, written out: one token, or none."""
    for size in range(longest, shortest - 1, -1):
        for at in range(len(history) - size - 1, -1, -1):
            if history[at : at + size] == history[-size:]:
                return [history[at + size]]
    return []


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
def test_every_token_of_a_window_is_what_a_window_that_begins_with_it_begins_with(
    history: list[int], count: int, longest: int, shortest: int
) -> None:
    expected: list[int] = []
    while len(expected) < count and (token := looked_up(history + expected, longest, shortest)):
        expected += token
    assert propose(history, count, longest, shortest) == expected


def test_several_requests_in_one_plan() -> None:
    import dataclasses

    work = []
    for request_id, history in ((1, [1, 2, 1]), (2, [3, 4]), (3, [5, 5])):
        state = dataclasses.replace(sequence_state(SamplingParams(), history), request_id=request_id)
        work.append(DraftWork(ForwardWork(state, (), 0, 1, ()), 2))
    windows = NGramDrafter().propose(DraftPlan(tuple(work))).windows
    assert {i: [d.token for d in window] for i, window in windows.items()} == {1: [2, 1], 2: [], 3: [5, 5]}

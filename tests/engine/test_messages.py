"""What crosses between stages is frozen and made of plain values."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
from engine_requests import drafted, sequence_state

from pearl import messages
from pearl.messages import (
    Decision,
    DraftPlan,
    DraftWork,
    ForwardWork,
    SchedulerOutput,
    TargetPlan,
    VerifyWork,
)
from pearl.sampling_params import SamplingParams

CLASSES = [
    value
    for _, value in inspect.getmembers(messages, inspect.isclass)
    if value.__module__.startswith(f"{messages.__name__}.")
    and (dataclasses.is_dataclass(value) or issubclass(value, tuple))
]
STATE = sequence_state(SamplingParams())


def test_every_message_is_frozen() -> None:
    assert len(CLASSES) >= 15
    assert [c.__name__ for c in CLASSES if not (issubclass(c, tuple) or c.__dataclass_params__.frozen)] == []


@pytest.mark.parametrize(
    ("message", "name"),
    [
        (STATE, "lane"),
        (ForwardWork(STATE, (1,), 0, 1, (0,)), "start"),
        (VerifyWork(1, drafted(2), 4), "pending"),
        (SchedulerOutput(TargetPlan(()), DraftPlan(())), "target"),
        (Decision((1,), 1, None, None), "accepted"),
    ],
)
def test_a_message_cannot_be_changed(message: Any, name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(message, name, None)


def test_sequences_in_messages_are_tuples() -> None:
    """A frozen message with a list inside would still be shared, mutable state."""
    wrong = [
        f"{c.__name__}.{name}: {kind}"
        for c in CLASSES
        for name, kind in inspect.get_annotations(c).items()
        if getattr(kind, "__forward_arg__", kind).startswith(("list[", "set[", "Sequence["))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("tested", "accepted", "next_token", "committed", "rejected"),
    [
        ((5, 6, 7), 3, None, (5, 6, 7), False),
        ((5, 6, 7), 3, 9, (5, 6, 7, 9), False),
        ((5, 6, 7), 1, 9, (5, 9), True),
        ((5,), 0, 9, (9,), True),
        ((), 0, 9, (9,), False),
        ((5,), 1, 0, (5, 0), False),  # token 0 is a token
    ],
)
def test_decision_commits_what_held_and_what_follows(
    tested: tuple[int, ...], accepted: int, next_token: int | None, committed: tuple[int, ...], rejected: bool
) -> None:
    decision = Decision(tested, accepted, next_token, None)
    assert decision.committed == committed
    assert decision.rejected == rejected


def test_forward_ends_after_its_tokens() -> None:
    assert ForwardWork(STATE, (7, 8, 9), 4, 0, ()).end == 7


@pytest.mark.parametrize(
    ("target", "draft", "empty"),
    [((), (), True), ((ForwardWork(STATE, (1,), 0, 1, (0,)),), (), False), ((), (1,), False)],
)
def test_a_plan_is_empty_when_nobody_works(target: Any, draft: Any, empty: bool) -> None:
    work = tuple(DraftWork(ForwardWork(STATE, (1,), 0, 1, (0,)), 1) for _ in draft)
    assert SchedulerOutput(TargetPlan(target), DraftPlan(work)).is_empty == empty

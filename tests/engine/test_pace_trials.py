"""The automatic pace where requests come and go whose texts are easy or hard: plain decoding is left for trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pace_sim import Batch, Machine, auto, served

from pearl.methods import METHODS
from pearl.pace import FixedPace, Load, PacePolicy
from pearl.pace.acceptance import Odds

HEAD = Machine(1.0, 7.4, 0.35, 0.35, beside=1.5, noise=0.06)  # a drafter whose gain hangs on the text


def coming_and_going(policy: PacePolicy, batch: int, odds: Callable[[int], float], rounds: int, skip: int) -> float:
    """Requests of a hundred tokens, each with odds of its own."""
    requests = Batch(HEAD, batch, lambda request, _: Odds(odds(request), odds(request)), lasting=100)
    return served(policy, requests, rounds, skip)


@pytest.mark.parametrize("batch", [1, 4])
def test_hard_texts_are_not_held_against_easy_ones_that_come_later(batch: int) -> None:
    """Plain decoding tests nothing: what twelve requests of each lane have shown must not stand for ever."""

    def odds(request: int) -> float:
        return 0.1 if request < 12 * batch else 0.75

    plain = coming_and_going(FixedPace("autoregressive", 1), batch, odds, 2400, 1600)
    assert coming_and_going(auto(HEAD), batch, odds, 2400, 1600) > 1.4 * plain


def test_hard_texts_cost_little_to_look_at() -> None:
    plain = coming_and_going(FixedPace("autoregressive", 1), 1, lambda _: 0.1, 2000, 200)
    assert coming_and_going(auto(HEAD), 1, lambda _: 0.1, 2000, 200) > 0.95 * plain


def test_one_hard_request_does_not_speak_for_the_next() -> None:
    def odds(request: int) -> float:
        return 0.08 if request == 0 else 0.7

    best = coming_and_going(FixedPace("speculative", 2), 1, odds, 600, 100)
    assert coming_and_going(auto(HEAD), 1, odds, 600, 100) > 0.9 * best


def test_a_new_request_after_plain_decoding_gets_a_choice_and_trials_of_its_own() -> None:
    policy = auto(HEAD)
    for _ in Batch(HEAD, 1, lambda *_: Odds(0.05, 0.05)).serve(policy, 500):
        pass
    policy._deciding = 0.0  # choosing is paid for
    while policy._latest.best.mode != "autoregressive" or policy._hopes.waits(policy._asked) < 20:  # type: ignore[union-attr]
        policy._hopes.try_it(policy._asked)
        policy.decide([0], Load(1, 100), False)
    before = policy._chosen
    policy.decide([0], Load(1, 100), False)
    assert policy._chosen == before  # the same request's is kept
    policy.decide([1], Load(1, 100), False)
    assert policy._chosen == policy._asked
    assert policy._hopes.waits(policy._asked) <= 8


@pytest.mark.parametrize(("context", "tried"), [(20, True), (400, False)])
def test_a_long_prompt_is_not_drafted_for_on_trial(context: int, tried: bool) -> None:
    policy = auto(HEAD)
    for _ in Batch(HEAD, 1, lambda *_: Odds(0.05, 0.05)).serve(policy, 500):
        pass
    policy._asked = policy._hopes._drafted + 100
    policy._hopes.renew()
    load = Load(1, context)
    now = policy._situation(policy._acceptance.odds([1], policy._asked), load, False)
    allowed = policy._may_hope([1], load)
    hoped = policy._acceptance.hoped([1], policy._acceptance.odds([1], policy._asked), 2.0)
    trial = policy._hope(policy._best("autoregressive", now), list(METHODS), now, hoped)
    assert (allowed and trial is not None) is tried


def test_when_drafting_ran_last_is_known() -> None:
    policy = auto(HEAD)
    for _ in Batch(HEAD, 1, lambda *_: Odds(0.9, 0.9)).serve(policy, 400):
        pass
    assert policy._hopes.errors(16, policy._asked) < 1.0


def test_plain_decoding_is_kept_no_longer_than_until_the_next_trial() -> None:
    policy, kept = auto(HEAD), list[tuple[int, int]]()
    decide = policy._decide

    def decided(*args: Any) -> Any:
        decision, waits = decide(*args), policy._hopes.waits(policy._asked)
        if waits and decision.choice.mode == "autoregressive":
            kept.append((decision.until - policy._rounds, max(waits, 6)))
        return decision

    policy._decide = decided  # type: ignore[method-assign]
    for _ in Batch(HEAD, 1, lambda request, _: Odds(0.15, 0.15), lasting=100).serve(policy, 1500):
        pass
    assert len(kept) > 5
    assert all(rounds <= most for rounds, most in kept)

"""When drafting is tried again after plain decoding."""

from __future__ import annotations

import pytest

from pearl.pace.hopes import Hopes


def test_the_odds_of_one_request_may_easily_be_better_those_of_many_after_a_while() -> None:
    hopes = Hopes()
    hopes.note("pearl", 1000)
    assert hopes.errors(1, 1000) == 2.0
    assert hopes.errors(16, 1000) == 0.5
    assert hopes.errors(16, 1256) == 1.0
    assert hopes.errors(16, 9000) == hopes.errors(1, 9000) == 2.0
    hopes.note("autoregressive", 9000)
    assert hopes.errors(16, 9000) == 2.0


def test_each_trial_is_waited_for_twice_as_long_until_all_requests_are_new() -> None:
    hopes, now = Hopes(), 100
    assert hopes.waits(now) == 0
    waits = []
    for _ in range(7):
        hopes.try_it(now)
        waits.append(hopes.waits(now))
        now += waits[-1]
        assert hopes.waits(now) == 0
    assert waits == [8, 16, 32, 64, 128, 256, 256]
    hopes.try_it(now)
    assert hopes.waits(now + 56) == 200
    hopes.renew()
    assert hopes.waits(now + 1) == 0


@pytest.mark.parametrize(
    ("behind", "batch", "plain", "allowed"),
    [(0, 1, 0, True), (32, 1, 33, False), (32, 1, 34, True), (150, 64, 700, False), (150, 64, 750, True)],
)
def test_the_draft_comes_back_when_that_is_cheap_beside_what_was_decoded_without(
    behind: int, batch: int, plain: int, allowed: bool
) -> None:
    hopes = Hopes()
    hopes.note("speculative", 70)
    assert hopes.allows(behind, batch, 70 + plain) is allowed

"""How likely drafted tokens are thought to hold: of each request, of a new one, and of what may be hoped for."""

from __future__ import annotations

import pytest

from pearl.pace import Progressed
from pearl.pace.acceptance import Acceptance


def test_the_first_token_after_a_correction_is_counted_apart() -> None:
    acceptance = Acceptance()
    for _ in range(200):
        acceptance.observe([Progressed(1, 1, 0, 1)], 1)  # falls at once
        acceptance.observe([Progressed(1, 1, 1, 1)], 1)  # holds,
        acceptance.observe([Progressed(1, 4, 4, 4)], 1)  # and so do four after it,
        acceptance.observe([Progressed(1, 1, 0, 1)], 1)  # not the fifth
    first, later = acceptance.odds([1], 1)[0]
    assert first == pytest.approx(1 / 2, abs=0.05)
    assert later == pytest.approx(4 / 5, abs=0.05)


def test_what_no_window_was_long_enough_to_tell_is_judged_by_what_was_told() -> None:
    """Windows of one token: when they begin to hold, more would follow; that it was not so once does not count."""
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.observe([Progressed(1, 4, 1, 2)], 1)  # later ones fall
    for _ in range(10):
        acceptance.observe([Progressed(1, 1, 1, 2)], 1)  # one, which holds, and a token of the target's own
    assert acceptance.odds([1], 1)[0].later < 0.3
    for _ in range(600):
        acceptance.observe([Progressed(1, 1, 1, 2)], 1)
    assert acceptance.odds([1], 1)[0].later > 0.7


def test_each_request_has_odds_of_its_own_and_new_ones_those_of_all() -> None:
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.observe([Progressed(1, 4, 4, 4), Progressed(2, 4, 0, 1)], 1)
    easy, hard, new = acceptance.odds([1, 2, 3], 1)
    assert easy.later > new.later > 0.5
    assert hard.first < new.first
    assert 0 < hard.first < easy.later < 1


def test_acceptance_follows_a_change() -> None:
    acceptance = Acceptance()
    for held in [4] * 100 + [1] * 60:
        acceptance.observe([Progressed(1, 4, held, held + (held < 4))], 1)
    assert acceptance.odds([1], 1)[0].later < 0.5


def test_others_count_by_requests_not_by_their_tests() -> None:
    acceptance = Acceptance()
    for now in range(1, 400):
        acceptance.observe([Progressed(1, 4, 0, 1)], now)  # one long request whose drafts never hold,
    hard = acceptance.of_a_new_one.first
    acceptance.odds([2], 400)
    for now in range(400, 420):
        acceptance.observe([Progressed(2, 4, 4, 4)], now)  # and a short one whose drafts do
    acceptance.odds([3], 420)
    assert 0.2 < hard < 0.4  # a guess is worth half a request
    assert acceptance.of_a_new_one.later > 0.5
    for request in range(3, 40):
        acceptance.observe([Progressed(request, 4, 0, 1)] * 20, 420 + request)
        acceptance.odds([request + 1], 421 + request)
    assert acceptance.of_a_new_one.first < 0.15


def test_what_was_tested_long_ago_tells_less() -> None:
    acceptance = Acceptance()
    acceptance.observe([Progressed(2, 4, 4, 4)] * 20, 1)
    acceptance.observe([Progressed(1, 4, 0, 1)] * 20, 1)
    now, later = acceptance.odds([1, 2], 1)[0].first, acceptance.odds([1, 2], 1000)[0].first
    assert later > now + 0.2
    assert later == pytest.approx(acceptance.of_a_new_one.first, abs=0.02)


def test_what_may_be_hoped_for_shrinks_with_tests() -> None:
    acceptance = Acceptance()
    hoped = []
    for tests in (0, 8, 60):
        acceptance.observe([Progressed(1, 1, 0, 1)] * tests, 1)
        odds = acceptance.odds([1], 1)
        assert acceptance.hoped([1], odds, 0.0) == odds
        hoped.append(acceptance.hoped([1], odds, 2.0)[0].first - odds[0].first)
    assert hoped[0] == pytest.approx(0.19)  # no chance is thought greater than 0.99
    assert hoped[1] > hoped[2] > 0.05
    assert [acceptance.has_tested(ids) for ids in ([1], [1, 2], [])] == [True, False, True]


def test_rounds_that_judged_nothing_change_nothing() -> None:
    acceptance = Acceptance()
    before = acceptance.odds([1], 1)
    acceptance.observe([Progressed(1, 0, 0, 0)], 1)
    assert acceptance.odds([1], 1) == before

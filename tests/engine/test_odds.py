"""Which branches are chosen: by the formulas of docs/algorithm.md, and by nothing that a blind choice may not see."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from pearl.engine.odds import MOST_RANKS, Choice, Confidence, Odds, Place, choose
from pearl.messages import Decision, Drafted, Ranked


def token(own: float, *others: float, first: int = 10) -> Drafted:
    """A token of probability ``own``, with alternatives of these."""
    tokens = tuple(range(first, first + len(others)))
    return Drafted(1, 0.0, -1, Ranked(math.log(own), tokens, tuple(math.log(p) for p in others)))


def test_greedy_places_follow_the_drafts_own_probabilities() -> None:
    pending = [token(0.8, 0.1, 0.05), token(0.5, 0.4)]
    places = Odds("rejection").places(pending, Confidence(0.0, 0.0), sampled=False, blind=False, late=True)
    assert [(p.held, p.late) for p in places] == [(0, False), (1, False), (2, True)]
    assert [p.chance for p in places] == pytest.approx([0.2, 0.8 * 0.5, 0.8 * 0.5 * 0.5])
    assert places[0].shares == pytest.approx([0.5, 0.25])  # of the 0.2 that are left
    assert places[1].shares == pytest.approx([0.8])
    assert len(places[2].shares) == MOST_RANKS


def test_perturbed_scores_share_everything_among_the_alternatives() -> None:
    ranked = Ranked(2.0, (5, 6), (1.0, 0.0))
    place = Odds("coupled").places([Drafted(1, 0.0, -1, ranked)], Confidence(0.0, 0.0), True, False, False)[0]
    weights = [math.exp(2.0), math.exp(1.0), 1.0]
    assert place.chance == pytest.approx(1 - weights[0] / sum(weights))
    assert place.shares == pytest.approx([weights[1] / sum(weights[1:]), weights[2] / sum(weights[1:])])


def test_a_token_that_was_not_ranked_is_no_place_but_may_fail() -> None:
    pending = [Drafted(1, 0.0, -1), token(0.8, 0.1)]
    places = Odds("rejection").places(pending, Confidence(0.0, 0.0), sampled=False, blind=False, late=False)
    assert [p.held for p in places] == [1]
    assert places[0].chance == pytest.approx(0.5 * 0.2)


def test_a_blind_choice_sees_nothing_of_what_was_drawn() -> None:
    """The same places whatever the tokens, their scores and their alternatives: only how many of these there are."""
    odds, known = Odds("rejection"), Confidence(0.7, 0.3)
    draws = random.Random(0)

    def places(blind: bool) -> list[Place]:
        pending = [
            token(draws.uniform(0.3, 0.6), 0.3, draws.uniform(0, 0.1), first=draws.randint(2, 99)) for _ in "123"
        ]
        return odds.places(pending, known, sampled=True, blind=blind, late=True)

    assert places(True) == places(True)
    assert places(False) != places(False)


def test_the_likeliest_of_all_requests_are_chosen_in_order() -> None:
    draws = random.Random(1)
    places = [
        [
            Place(
                held, draws.random(), sorted((draws.random() for _ in range(draws.randint(0, 4))), reverse=True), False
            )
            for held in range(4)
        ]
        for _ in range(5)
    ]
    every = [
        (-place.chance * share, Choice(request, place, rank))
        for request, own in enumerate(places)
        for place in own
        for rank, share in enumerate(place.shares)
    ]
    expected = [choice for _, choice in sorted(every, key=lambda scored: scored[0])]
    for most in (0, 1, 3, len(every), 10**6):
        assert choose(places, most) == expected[:most]
        assert all(choice.rank < most for choice in choose(places, most))


def test_verdicts_teach_how_sure_a_draft_may_be() -> None:
    """Of a draft that is right half as often as it says, and whose second alternative is what follows."""
    odds = Odds("rejection")
    confidence, draws = odds.confidence(), random.Random(2)
    drafted = token(0.9, 0.05, 0.02)
    assert drafted.ranked is not None
    for _ in range(600):
        held = draws.random() < 0.45
        decision = Decision((1,), 1, 7, None) if held else Decision((1,), 0, drafted.ranked.tokens[1], None)
        odds.observe([drafted], decision, confidence, sampled=False)
    (place,) = odds.places([drafted], confidence, sampled=False, blind=False, late=False)
    assert 0.3 < 1 - place.chance < 0.6
    late = odds.places([], confidence, sampled=False, blind=False, late=True)[0]
    assert 0.3 < 1 - late.chance < 0.6
    assert late.shares[1] > 0.8
    assert sum(odds.shares) <= 1


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize("sampled", [False, True])
def test_rows_that_are_no_distribution_teach_nothing_wrong(rule: str, sampled: bool) -> None:
    odds = Odds(rule)  # type: ignore[arg-type]
    confidence = odds.confidence()
    for drawn, held in itertools.product((math.nan, math.inf, -math.inf, 0.0, 100.0), (False, True)):
        drafted = Drafted(0, 0.0, -1, Ranked(drawn, (), ()))
        odds.observe([drafted], Decision((0,), int(held), 3, None), confidence, sampled)
        for place in odds.places([drafted], confidence, sampled, blind=False, late=True):
            assert 0 <= place.chance <= 1
            assert all(0 <= share <= 1 for share in place.shares)

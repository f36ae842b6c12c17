"""A contender's share of the best of the others: who is best is said by the other repeats."""

from __future__ import annotations

import random

import pytest

from pearl.bench.best_of_others import share_of_best


def test_the_best_is_chosen_without_the_repeat_that_is_compared() -> None:
    """``lucky`` has the largest speed of all, once, in the repeat in which it is not chosen for that."""
    share = share_of_best([10.0, 12.0, 9.0, 10.0], {"steady": [10.0] * 4, "lucky": [9.0, 9.0, 9.0, 40.0]})
    assert share is not None
    assert (share.median, share.best) == (1.0, "steady")
    assert (share.low, share.high) == pytest.approx((0.975, 1.05))


def test_contenders_that_are_alike_reach_each_other() -> None:
    """Of twenty that differ by noise alone one has the best median, by luck; the share shows none of it."""
    rng, shares, naive = random.Random(0), [], []
    for _ in range(200):
        own, *others = ([rng.gauss(100, 5) for _ in range(5)] for _ in range(21))
        share = share_of_best(own, dict(enumerate(others)))  # type: ignore[arg-type]
        assert share is not None
        shares.append(share.median)
        naive.append(sorted(own)[2] / max(sorted(other)[2] for other in others))
    assert sum(shares) / 200 == pytest.approx(1.0, abs=0.01)
    assert sum(naive) / 200 < 0.97


def test_repeats_that_have_not_all_ended_and_too_little_to_compare() -> None:
    share = share_of_best([8.0, 9.0], {"a": [10.0, 10.0, 99.0], "b": [1.0, 1.0]})
    assert share is not None
    assert share.median == pytest.approx(0.85)
    assert share_of_best([8.0], {"a": [10.0]}) is None
    assert share_of_best([8.0, 9.0], {}) is None
    assert share_of_best([8.0, 9.0], {"a": []}) is None

"""How prompts share a forward's tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pearl.engine.prompt_budget import share


@pytest.mark.parametrize(
    ("budget", "needs", "shares"),
    [
        (10, {}, {}),
        (10, {7: 30}, {7: 10}),
        (10, {7: 4}, {7: 4}),
        (10, {7: 30, 8: 3}, {7: 7, 8: 3}),  # what the short one leaves is the oldest's again
        (10, {7: 30, 8: 20, 9: 4}, {7: 5, 8: 1, 9: 4}),
        (10, {8: 3, 7: 30}, {8: 3, 7: 7}),
        (1, {7: 30, 8: 3}, {7: 1, 8: 0}),
        (6, {1: 4, 2: 4, 3: 4}, {1: 4, 2: 2, 3: 0}),  # equals in the order that they came in
    ],
)
def test_the_oldest_has_half_and_the_shortest_come_first(
    budget: int, needs: dict[int, int], shares: dict[int, int]
) -> None:
    assert share(budget, needs) == shares


@given(st.integers(1, 50), st.dictionaries(st.integers(0, 9), st.integers(1, 60), min_size=1, max_size=6))
def test_the_budget_is_used_up_and_no_more(budget: int, needs: dict[int, int]) -> None:
    shares = share(budget, needs)
    assert shares.keys() == needs.keys()
    assert all(0 <= shares[one] <= needs[one] for one in needs)
    assert sum(shares.values()) == min(budget, sum(needs.values()))
    oldest = next(iter(needs))
    assert shares[oldest] >= min(needs[oldest], budget / 2)

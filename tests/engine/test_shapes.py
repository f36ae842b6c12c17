"""Shapes of captured forwards: they hold what comes up, waste little, and are few."""

from __future__ import annotations

import random

import pytest

from pearl.workers.graph_runner import _MOST_GRAPHS
from pearl.workers.shapes import ShapeLimits, row_bucket


def limits(sequences: int = 16, window: int = 16, tokens: int = 4096, page_size: int = 16) -> ShapeLimits:
    rows = row_bucket(min(512, sequences * (window + 1)))
    return ShapeLimits(rows, window + 1, sequences, -(-tokens // page_size), page_size)


def test_rows_hold_their_count() -> None:
    sizes = [row_bucket(count) for count in range(1, 2000)]
    assert sorted(set(sizes))[:18] == [1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320]
    for count, size in enumerate(sizes, 1):
        assert count <= size == row_bucket(size)
        assert size < 2 * count
        assert count <= 64 or (size - count) / size <= 0.2


def test_a_shape_holds_its_batch_and_its_padding() -> None:
    few = limits(sequences=9, tokens=700)
    assert few.widths() == [44]
    assert few.shape(3, 3, 7) == (4, 4, 44)
    assert few.shape(9, 9, 44) == (16, 9, 44)
    assert limits(tokens=32768).widths() == [64, 256, 1024, 2048]
    assert limits(tokens=32768, page_size=256).widths() == [4, 16, 64, 128]
    assert limits().shape(1, 1, 257).pages == 257  # longer than a model was made for: its own shape, not a wrong one
    assert limits(tokens=16, page_size=4).shape(40, 16, 4) == (48, 16, 12)  # padding's rows need pages too


@pytest.mark.parametrize(("sequences", "window", "tokens"), [(1, 4, 512), (16, 16, 8192), (5, 3, 100), (64, 5, 32768)])
def test_all_shapes_that_come_up_are_known_before(sequences: int, window: int, tokens: int) -> None:
    some, chance = limits(sequences, window, tokens), random.Random(7)
    known = some.shapes()
    assert len(set(known)) == len(known)
    seen = set()
    for _ in range(3000):
        count = chance.randint(1, sequences)
        rows = sum(chance.randint(1, window + 1) for _ in range(count))
        if rows <= some.rows:
            seen.add(some.shape(rows, count, chance.randint(1, some.pages)))
    assert seen <= set(known)
    assert len(seen) > 0.4 * len(known)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 60),
        ({"window": 4}, 35),
        ({"tokens": 32768}, 120),
        ({"sequences": 1, "tokens": 32768}, 25),
        ({"sequences": 64, "window": 5, "tokens": 8192}, 95),
        ({"sequences": 64, "tokens": 131072}, _MOST_GRAPHS),
        ({"sequences": 256, "window": 5, "tokens": 32768}, _MOST_GRAPHS),
    ],
)
def test_they_are_few(options: dict[str, int], most: int) -> None:
    """At most as many as are kept."""
    assert 10 < len(limits(**options).shapes()) <= most

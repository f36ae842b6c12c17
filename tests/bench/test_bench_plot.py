"""The picture of a contest, drawn from results made by hand."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pearl.bench.measure import MethodResult
from pearl.bench.plot import draw_speeds, spread_out

pytest.importorskip("matplotlib")


def result(method: str, batch: int, tok_s: float) -> MethodResult:
    return MethodResult(method, batch, 8, 80, 1.0, tok_s, 0.1, 1.0, 2.0, 0.8, 4.0, {}, 10, 40, 0.9, 5)


def texts(svg: Path) -> list[str]:
    """Matplotlib draws text as shapes, each with its text as a comment."""
    return re.findall(r"<!-- (.+) -->", svg.read_text("utf-8"))


def test_lines_over_the_batch_are_named_and_fixed_windows_numbered(tmp_path: Path) -> None:
    path = tmp_path / "speeds.svg"
    names = ("autoregressive", "pearl", "pearl@balanced", *(f"pearl@{window}" for window in (41, 43)), "speculative@47")
    draw_speeds([result(name, batch, 100.0 * batch) for name in names for batch in (1, 4, 64)], "a title", path)
    found = texts(path)
    wanted = ("autoregressive", "pearl", "pearl@balanced", "pearl at fixed windows", "speculative at fixed windows")
    for text in (
        *wanted,
        "1",
        "4",
        "64",
        "41",
        "43",
        "47",
        "a title",
        "tokens per second",
        "requests that run at once",
    ):
        assert found.count(text) == 1, text


def test_a_single_batch_has_a_bar_for_each_contender(tmp_path: Path) -> None:
    path = tmp_path / "speeds.svg"
    draw_speeds([result(f"pearl@{window}", 4, 1000.0 + window) for window in (3, 5)], "a title", path)
    assert {"pearl@3", "pearl@5", "1003", "1005", "a title"} <= set(texts(path))


def test_a_png_is_one(tmp_path: Path) -> None:
    path = tmp_path / "speeds.png"
    draw_speeds([result("pearl", batch, 100.0) for batch in (1, 2)], "a title", path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_labels_near_each_other_move_apart_around_their_mean() -> None:
    assert spread_out([1.0, 5.0, 9.0], 2.0) == [1.0, 5.0, 9.0]
    assert spread_out([5.0, 5.0, 5.0, 20.0], 2.0) == [3.0, 5.0, 7.0, 20.0]
    assert spread_out([0.0, 3.0, 3.2], 2.0) == pytest.approx([0.0, 2.1, 4.1])
    assert spread_out([], 2.0) == []


@given(st.lists(st.floats(0, 100), max_size=20).map(sorted))
def test_labels_never_overlap_and_keep_their_order(values: list[float]) -> None:
    places = spread_out(values, 3.0)
    assert len(places) == len(values)
    assert all(high - low >= 3.0 - 1e-9 for low, high in pairwise(places))
    assert sum(places) == pytest.approx(sum(values))

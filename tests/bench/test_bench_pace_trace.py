"""The picture of the pace, drawn from rounds made by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bench_support import Finished, hand_made_round

from bench.pace_trace import COLOURS, draw_pace, spans
from pearl.engine.rounds import RoundRecord
from pearl.messages import Busy
from pearl.methods import METHODS, Mode
from pearl.pace import Pace

pytest.importorskip("matplotlib")

SCRIPT = "pace_trace.py"


def rounds(mode: Mode, count: int, start: float) -> list[RoundRecord]:
    """Of 10 ms, 3 tokens and a window of 2 each; 400 tokens per second were predicted."""
    made = []
    for number in range(count):
        whole = Busy(start + number * 0.01, 0.01)
        record = hand_made_round(
            number, whole=whole, target=whole, draft=whole, drafted=2, accepted=2, own=True, mode=mode
        )
        made.append(replace(record, plan=replace(record.plan, pace=Pace(mode, (2,), tokens_per_second=400.0))))
    return made


def test_means_are_taken_over_spans_of_time() -> None:
    found = spans(rounds("pearl", 25, 7.0), seconds=0.095)
    assert len(found) == 2
    assert found[0] == pytest.approx((0.1, 1, 2, 300, 400))
    assert found[1].at == pytest.approx(0.2)


def test_the_picture_shows_the_modes_that_were_run(tmp_path: Path) -> None:
    path = tmp_path / "pace.svg"
    draw_pace([*rounds("pearl", 20, 3.0), *rounds("autoregressive", 20, 3.2)], path, 0.05)
    words = set(re.findall(r"<!-- (.+) -->", path.read_text("utf-8")))
    assert {"measured", "predicted", "pearl", "autoregressive", "requests"} <= words
    assert "speculative" not in words


def test_every_mode_has_a_colour() -> None:
    assert set(COLOURS) == set(METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("picture.txt",), "draws .png and .svg"), (("picture.svg", "--load", "1,x"), "--load takes integers")],
)
def test_what_cannot_be_drawn_is_refused_before_anything_runs(
    script: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("bench.pace_trace.LLM", lambda **_: pytest.fail("models were loaded"))
    finished = script(*arguments)
    assert (finished.code, finished.out) == (2, "")
    assert message in finished.err

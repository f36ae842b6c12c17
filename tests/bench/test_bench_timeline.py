"""The picture of a decoding method, drawn from rounds made by hand."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bench_support import Finished, hand_made_round

from bench.timeline import PREPARED_COLOUR, RUNS, draw_timeline
from pearl.config import EngineConfig
from pearl.engine.rounds import RoundRecord
from pearl.messages import Branch, Busy, Drafted, DraftPlan

pytest.importorskip("matplotlib")

SCRIPT = "timeline.py"


def pearl_rounds(start: float) -> list[RoundRecord]:
    """Rounds of 10 ms that commit 3, 1 and 2 tokens."""
    target, draft = 0.008, 0.009
    return [
        hand_made_round(
            number,
            whole=Busy(start + number * 0.01, 0.01),
            target=Busy(start + number * 0.01, target),
            draft=Busy(start + number * 0.01, draft),
            drafted=3,
            accepted=accepted,
            own=own,
        )
        for number, (accepted, own) in enumerate([(3, False), (0, True), (1, True)])
    ]


def autoregressive_rounds(start: float) -> list[RoundRecord]:
    return [
        hand_made_round(n, whole=Busy(start + n * 0.01, 0.01), target=Busy(start + n * 0.01, 0.01), own=True)
        for n in range(3)
    ]


def titles(svg: Path) -> list[str]:
    """Matplotlib draws text as shapes, each with its text as a comment."""
    return re.findall(r"<!-- (.+: \d+ tokens) -->", svg.read_text("utf-8"))


def test_a_png_is_written(tmp_path: Path) -> None:
    path = tmp_path / "timeline.png"
    draw_timeline({"autoregressive": autoregressive_rounds(5.0), "pearl": pearl_rounds(7.0)}, path, 40)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert 10_000 < len(data) < 1_000_000
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (1300, 507)  # 10 by 3.9 inches


def test_an_svg_has_one_title_for_each_method(tmp_path: Path) -> None:
    path = tmp_path / "timeline.svg"
    draw_timeline({"autoregressive": autoregressive_rounds(5.0), "pearl": pearl_rounds(7.0)}, path, 40)
    assert titles(path) == ["autoregressive: 3 tokens", "pearl: 6 tokens"]


def test_rounds_past_the_end_of_the_axis_are_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "timeline.svg"
    draw_timeline({"pearl": pearl_rounds(100.0)}, path, 25)
    assert titles(path) == ["pearl: 4 tokens"]


def test_the_picture_does_not_depend_on_when_the_run_was(tmp_path: Path) -> None:
    pictures = []
    for start in (0.0, 4.0):
        path = tmp_path / f"{start}.png"
        draw_timeline({"pearl": pearl_rounds(start)}, path, 40)
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1]


def test_a_dot_tells_a_drafted_token_from_the_target_s_own(tmp_path: Path) -> None:
    """4 accepted and 2 own tokens, and one dot of each in the legend."""
    path = tmp_path / "timeline.svg"
    draw_timeline({"pearl": pearl_rounds(0.0)}, path, 40)
    dots = re.findall(r"<use [^>]*style=\"fill: (#[0-9a-f]{6})", path.read_text("utf-8"))
    assert (dots.count("#4d9a6a"), dots.count("#b0413e")) == (4 + 1, 2 + 1)


@pytest.mark.parametrize(("token", "violet"), [(7, 2), (6, 0)], ids=("came true", "in vain"))
def test_tokens_of_a_prepared_window_have_their_own_colour(tmp_path: Path, token: int, violet: int) -> None:
    """A window of 2 tokens behind the first round's correction, 7; in the second one 3 tokens hold."""
    first, second = (
        hand_made_round(
            n, whole=Busy(n, 1), target=Busy(n, 0.8), draft=Busy(n, 0.9), drafted=3, accepted=3 * n, own=True
        )
        for n in range(2)
    )
    branch = Branch(0, 0, 0, token, 1, 2, ())
    (item,) = first.plan.draft.work
    plan = replace(first.plan, draft=DraftPlan((item._replace(branches=(branch,)),)))
    window = tuple(Drafted(t, 0.0, -1) for t in (token, 8, 9))
    first = replace(first, plan=plan, result=replace(first.result, prepared={branch.id: window}))
    path = tmp_path / "timeline.svg"
    draw_timeline({"pearl": [first, second]}, path, 4000)
    text = path.read_text("utf-8")
    dots = re.findall(r"<use [^>]*style=\"fill: (#[0-9a-f]{6})", text)
    assert (dots.count(PREPARED_COLOUR), dots.count("#4d9a6a"), dots.count("#b0413e")) == (
        violet + 1,
        4 - violet,
        2 + 1,
    )
    assert len(re.findall(rf"<path [^>]*style=\"fill: {PREPARED_COLOUR}", text)) == 1 + 1  # a bar, and the legend's


def test_the_pair_is_run_by_every_method() -> None:
    """Options of a variant are checked when it is made, after others ran for a while."""
    configs = [EngineConfig(**options) for options in RUNS.values()]
    assert [config.method for config in configs] == ["autoregressive", "speculative", "pearl", "pearl"]
    assert [config.prepared_windows for config in configs[2:]] == ["auto", 3]


@pytest.mark.parametrize(
    ("path", "message"), [("picture.txt", "draws .png and .svg"), ("/no/such/picture.png", "/no/such does not exist")]
)
def test_what_cannot_be_drawn_is_refused_before_anything_runs(
    script: Callable[..., Finished], monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setattr("pearl.LLM", lambda **_: pytest.fail("models were loaded"))
    finished = script(path)
    assert (finished.code, finished.out) == (2, "")
    assert message in finished.err

"""What a comparison of log-likelihoods and a load's report say, from what the clients write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.clients.lm_eval_agreement import Agreement, Likelihood, compare, read_samples, write_tasks
from bench.clients.load_reports import Report
from pearl.errors import PearlError

CHOICE, TEXT = ("choice", 0, 1), ("rolling", 0, 0)


def test_a_difference_is_found_wherever_it_is() -> None:
    expected = {CHOICE: Likelihood(-3.0, True), TEXT: Likelihood(-100.0, None)}
    assert compare("ids", expected, expected) == Agreement("ids", 2, 1, 0.0, 0)
    off = compare("ids", expected | {TEXT: Likelihood(-100.0002, None)}, expected)
    assert off.largest == pytest.approx(2e-4)
    assert not off.holds
    other = compare("ids", expected | {CHOICE: Likelihood(-3.0, False)}, expected)
    assert (other.largest, other.other_greedy, other.holds) == (0.0, 1, False)
    assert compare("ids", expected | {CHOICE: Likelihood(-3.00009, True)}, expected).holds


@pytest.mark.parametrize("found", [{}, {CHOICE: Likelihood(-3.0, True)}])
def test_what_is_missing_is_no_agreement(found: dict[tuple[str, int, int], Likelihood]) -> None:
    with pytest.raises(PearlError, match="log-likelihoods"):
        compare("texts", found, {CHOICE: Likelihood(-3.0, True), TEXT: Likelihood(-1.0, None)})
    with pytest.raises(PearlError, match="log-likelihoods"):
        compare("texts", {}, {})


def test_samples_are_read_as_lm_eval_writes_them(tmp_path: Path) -> None:
    below = tmp_path / "model"
    below.mkdir()
    samples = {
        "choice": {"doc_id": 4, "resps": [[["-1.5", "True"]], [["-2.25", "False"]]]},
        "rolling": {"doc_id": 0, "resps": [["-715.5"]]},
    }
    for task, sample in samples.items():
        (below / f"samples_pearl_{task}_2026-01-01.jsonl").write_text(json.dumps(sample) + "\n", "utf-8")
    assert read_samples(tmp_path) == {
        ("choice", 4, 0): Likelihood(-1.5, True),
        ("choice", 4, 1): Likelihood(-2.25, False),
        ("rolling", 0, 0): Likelihood(-715.5, None),
    }


def test_tasks_name_data_that_is_there(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    for name, fields in (("choice", {"prompt", "choices", "answer"}), ("rolling", {"text"})):
        (line,) = [line for line in (tmp_path / f"{name}.yaml").read_text("utf-8").splitlines() if " test: " in line]
        documents = Path(line.split(": ")[1]).read_text("utf-8").splitlines()
        assert all(json.loads(document).keys() == fields for document in documents)


def test_a_report_with_an_error_or_too_few_tokens_does_not_hold() -> None:
    assert Report("chat", 3, 0, 96).holds
    assert not Report("chat", 3, 1, 96).holds
    assert not Report("chat", 3, 0, 95).holds
    assert not Report("chat", 3, 0, 96, ("it broke",)).holds
    assert not Report("chat", 0, 0, 0).holds

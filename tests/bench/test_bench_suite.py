"""``bench/suite.py``: a study is measured, killed, goes on, is reported; wrong tokens are told."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from bench_support import ROOT, Finished, run_script
from evaluation_support import write_sets

from bench import greedy_agreement
from bench.evaluation.differences import compare
from bench.evaluation.records import read_records
from bench.evaluation.summary import Row
from pearl import LLM

pytest.importorskip("matplotlib")
SCRIPT = "suite.py"
Script = Callable[..., Finished]
SETUPS = "speculative@3,pearl@3,pearl,lookahead"


def arguments(data: Path, out: Path, *more: str) -> list[str]:
    return [
        "methods", "--out", str(out), "--data", str(data), "--data-sets", "humaneval,mt_bench", "--questions", "2",
        "--repeats", "2", "--max-tokens", "10", "--windows", "3", "--search-questions", "1", "--setups", SETUPS,
        "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def killed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """The folder of a run that was killed in the middle, and what it had written; half a line is added."""
    out = tmp_path_factory.mktemp("runs") / "suite"
    line = [sys.executable, str(ROOT / "bench" / SCRIPT), *arguments(data, out)]
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, cwd=out.parent, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    records, deadline = out / "methods.jsonl", time.monotonic() + 300
    while not records.exists() or records.read_bytes().count(b"\n") < 9:
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = records.read_bytes()
    there = there[: there.rfind(b"\n") + 1]
    records.write_bytes(there + b'{"data_set": "humaneval", "quest')
    return out, there


@pytest.fixture(scope="module")
def resumed(data: Path, killed: tuple[Path, bytes]) -> tuple[Path, Finished]:
    with pytest.MonkeyPatch.context() as patch:
        capture = Capture()
        return killed[0], run_script(SCRIPT, *arguments(data, killed[0]), monkeypatch=patch, capsys=capture)  # type: ignore[arg-type]


class Capture:
    """Of pytest's capsys, for fixtures that live longer: what is printed goes to the test's own output."""

    def readouterr(self) -> Finished:
        return Finished(0, "", "")


def test_a_killed_run_goes_on_where_it_was(killed: tuple[Path, bytes], resumed: tuple[Path, Finished]) -> None:
    out, finished = resumed
    assert finished.code == 0, finished.err
    whole = (out / "methods.jsonl").read_bytes()
    assert whole.startswith(killed[1]), "what was measured stays"
    rows = [json.loads(line) for line in whole.splitlines()][1:]
    keys = [(*row["questions"], row["turn"], row["setup"], row["repeat"]) for row in rows]
    assert len(keys) == len(set(keys)) == (2 + 2) * 5 * 2, "two questions, and a conversation of two turns"
    report = json.loads((out / "methods.json").read_text())
    assert report["resumed_answers"] == killed[1].count(b"\n") - 1 > 0
    assert [one["answers"] for one in report["equal"]] == [8] * 5


def test_what_a_study_says(resumed: tuple[Path, Finished]) -> None:
    out, _ = resumed
    report = json.loads((out / "methods.json").read_text())
    with (out / "methods.csv").open() as source:
        table = list(csv.DictReader(source))
    assert list(table[0]) == [field.name for field in fields(Row)]
    assert len(table) == len(report["results"]) == 5 * 5, "humaneval; mt_bench, its category, its two turns"
    rows = {(row["data_set"], row["part"], row["setup"]): row for row in report["results"]}
    base = rows["mt_bench", "all", "autoregressive"]
    assert (base["answers"], base["repeats"], base["speedup"]) == (2, 2, 1)
    assert rows["mt_bench", "turn 2", "pearl@3"]["answers"] == 1
    assert rows["humaneval", "all", "pearl@3"]["predicted"] > 0
    assert rows["humaneval", "all", "pearl"]["predicted"] is None
    assert 0 < rows["humaneval", "all", "speculative@3"]["acceptance"] <= 1
    assert all(one["equal"] == one["answers"] for one in report["equal"]), report["differences"]
    anatomy = report["anatomy"]["humaneval"]["pearl@3"]
    assert set(anatomy["kinds"]) <= {"pre", "post", "verify"}
    assert {"whole", "target", "draft", "verify", "host", "target_idle", "draft_idle"} == set(anatomy["seconds"])


def test_the_second_turn_is_about_the_first_answer(resumed: tuple[Path, Finished]) -> None:
    out, _ = resumed
    rows = [json.loads(line) for line in (out / "methods.jsonl").read_text().splitlines()][1:]
    plain = [r for r in rows if r["setup"] == "autoregressive" and r["data_set"] == "mt_bench" and r["repeat"] == 0]
    first, second = sorted(plain, key=lambda row: row["turn"])
    said = first["outputs"][0]
    prompt = second["prompts"][0]
    assert any(prompt[i : i + len(said) - 2] == said[1:-1] for i in range(len(prompt))), "but for its white space"


def test_the_report_is_whole_in_itself(resumed: tuple[Path, Finished]) -> None:
    out, _ = resumed
    page = (out / "report.html").read_text("utf-8")
    assert page.count("<svg") == page.count("</svg>") >= 4
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<img" not in page
    for text in (
        "Lookahead",
        "Equal outputs",
        "8 of 8",
        "dotted lines: verdicts.",
        "pearl@3",
        "python bench/suite.py methods",
    ):
        assert text in page, text
    text = (out / "report.md").read_text("utf-8")
    for name in ("speedups", "timeline", "kinds-methods", "times-methods"):
        assert f"(pictures/{name}.png)" in text
        assert (out / "pictures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    trace = json.loads((out / "trace.json").read_text())
    assert [name.partition("+")[0] for name in trace["runs"]][:3] == ["autoregressive", "speculative@3", "pearl@3"]


def plant(out: Path, setup: str, token: int) -> None:
    """Another third token in the first answer of a setup."""
    lines = (out / "methods.jsonl").read_text().splitlines()
    for index, line in enumerate(lines):
        row = json.loads(line)
        if row.get("setup") == setup and row["repeat"] == 0:
            assert row["outputs"][0][2] != token
            row["outputs"][0][2] = token
            lines[index] = json.dumps(row)
            break
    (out / "methods.jsonl").write_text("\n".join(lines) + "\n")


def test_a_wrong_token_is_told_with_both_logits(
    script: Script, data: Path, resumed: tuple[Path, Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "suite"
    shutil.copytree(resumed[0], out)
    plant(out, "pearl@3", 4000)
    finished = script(*arguments(data, out))
    assert finished.code == 0, finished.err
    shown = " ".join(finished.out.split())
    assert "pearl@3: 7 of 8 answers equal" in shown
    assert "token 2: 4000 at -" in shown
    assert "NO TIE" in shown
    (found,) = [d for d in json.loads((out / "methods.json").read_text())["differences"] if d["setup"] == "pearl@3"]
    assert (found["position"], found["token"], found["tie"]) == (2, 4000, False)
    assert found["expected_logprob"] > found["logprob"] + 1
    assert "4000 at" in (out / "report.html").read_text("utf-8")
    monkeypatch.setitem(greedy_agreement.TIES, "bfloat16", found["expected_logprob"] - found["logprob"])
    _, records = read_records(out / "methods.jsonl")
    with LLM(device="cpu", method="autoregressive") as llm:
        _, (difference,) = compare(records.values(), llm)
    assert difference.tie
    assert "a tie" in difference.sentence()


def test_a_run_goes_on_with_its_own_settings_only(script: Script, data: Path, resumed: tuple[Path, Finished]) -> None:
    finished = script(*arguments(data, resumed[0], "--max-tokens", "11"))
    assert finished.code == 2
    assert "was begun with max_tokens 10, and is to go on with 11; give another --out" in " ".join(finished.err.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["nothing"], "'nothing' is no study; there are methods, windows"),
        (["--data-sets", "humaneval,mbpp"], "--data-sets takes humaneval, gsm8k, mt_bench, mgsm, not 'mbpp'"),
        (["--temperatures", "0,hot"], "--temperatures takes numbers from 0 to 10"),
        (["--windows", "0"], "--windows takes integers >= 1"),
        (["windows", "--setups", "pearl"], "--setups is for the study of methods"),
        (["--data", "/nowhere"], "--data: /nowhere is no folder"),
        (["report"], "suite holds no study that was measured to its end; run one first"),
    ],
)
def test_what_is_refused_before_models_are_loaded(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pearl.llm.load_models", None)
    finished = script(*more)
    assert finished.code == 2, finished.err
    assert message in " ".join(finished.err.split())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["methods", "--setups", "lookahead,medusa"], "--setups: 'medusa' is none of autoregressive, "),
        (["windows", "--draft", "ngram"], "the study windows compares ways to use a draft model"),
        (["turns", "--data-sets", "humaneval", "--draft", "ngram"], "none of humaneval has what the study turns asks"),
    ],
)
def test_what_is_refused_before_anything_is_measured(
    script: Script, data: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    common = ["--out", str(tmp_path / "suite"), "--data", str(data), "--data-sets", "humaneval", "--draft", "ngram"]
    finished = script(*more[:1], *common, *more[1:])
    assert finished.code == 2, finished.err
    assert message in " ".join(finished.err.split())


@pytest.mark.parametrize(
    "content", ["no JSON\n", '{"settings": 3}\n', '{"settings": {"study": "x"}}\n{"data_set": 1}\n']
)
def test_a_file_of_something_else_is_not_written_over(script: Script, data: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "suite"
    out.mkdir()
    (out / "methods.jsonl").write_text(content)
    options = ["--out", str(out), "--data", str(data), "--data-sets", "humaneval", "--draft", "ngram"]
    finished = script("methods", *options)
    assert finished.code == 2
    assert "is no record of this program" in " ".join(finished.err.split())
    assert (out / "methods.jsonl").read_text() == content

"""``bench/throughput.py`` and ``pearl bench``: the report that they write, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_support import ROOT, Finished
from typer.testing import CliRunner

from pearl import LLM
from pearl.bench import contest
from pearl.bench.measure import MethodResult
from pearl.bench.prompt_sets import load_prompts
from pearl.bench.report import JsonReport
from pearl.cli.app import application, run
from pearl.config import EngineConfig
from pearl.models import Tokenizer, bundled_path

RESULT_KEYS = (
    "method",
    "batch",
    "prompts",
    "tokens",
    "seconds",
    "tok_s",
    "spread",
    "speedup",
    "mean_accepted_tokens",
    "acceptance_rate",
    "window",
    "modes",
    "target_forwards",
    "draft_forwards",
    "efficiency",
    "runs",
    "prepared",
    "prepared_hits",
    "prepared_accepted",
    "speeds",
)
Script = Callable[..., Finished]
SCRIPT = "throughput.py"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is work; a prompt set may be read."""
    monkeypatch.setattr(contest, "LLM", lambda **_: pytest.fail("models were loaded"))
    for name in ("load_models", "load_shapes"):
        monkeypatch.setattr(contest, name, lambda *_: pytest.fail("models were loaded"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "bench/throughput.py", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_a_run_that_is_killed_leaves_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    options = ("--prompts", "1", "--max-tokens", "8", "--repeats", "100000", "--json", str(out))
    with subprocess.Popen([sys.executable, "bench/throughput.py", *options], cwd=ROOT, stdout=subprocess.DEVNULL) as it:
        try:
            end = time.monotonic() + 60
            while not out.exists():
                assert it.poll() is None
                assert time.monotonic() < end
                time.sleep(0.02)
        finally:
            it.kill()
    report: dict[str, Any] = json.loads(out.read_text())
    assert report["complete"] is False
    assert report["results"][0]["runs"] >= 1
    assert report["settings"]["repeats"] == 100000


def test_the_main_job_writes_the_promised_report(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    finished = command("--prompts", "2", "--max-tokens", "8", "--repeats", "1", "--json", str(out))
    assert finished.returncode == 0, finished.stderr
    assert str(out) in finished.stdout.replace("\n", "")
    report: dict[str, Any] = json.loads(out.read_text())
    assert report["complete"] is True
    assert sorted(report) == ["commit", "complete", "machine", "results", "settings", "versions"]
    assert [row["method"] for row in report["results"]] == ["autoregressive", "speculative", "pearl"]
    for row in report["results"]:
        assert tuple(row) == RESULT_KEYS
        assert 1 <= row["tokens"] <= 2 * 8
        assert row["tok_s"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["target_forwards"] >= 2
        assert row["efficiency"] > 0
        assert (row["batch"], row["prompts"], row["spread"]) == (1, 2, None)
        assert sum(row["modes"].values()) == pytest.approx(1)
    assert report["results"][0]["speedup"] == 1
    assert report["results"][0]["modes"] == {"autoregressive": 1}
    settings = report["settings"]
    assert (settings["prompts"], settings["max_tokens"], settings["repeats"]) == (2, 8, 1)
    assert (settings["methods"], settings["batch"]) == (["autoregressive", "speculative", "pearl"], [1])
    assert (settings["dataset"], settings["target"], settings["draft"]) == ("builtin", "bundled", "bundled")


def test_a_refusal_of_the_real_command_is_one_line() -> None:
    finished = command("--methods", "pearl,magic")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert re.fullmatch(r"error: .*'magic'.*\n", finished.stderr)


BAD = [
    (("--methods", "pearl,magic"), "magic"),
    (("--methods", ","), "method"),
    (("--methods", "pearl,pearl"), "pearl"),
    (("--methods", "pearl@1-4,pearl@3"), "pearl@3 is there twice"),
    (("--methods", "pearl@0"), "'pearl@0': behind @ stand a window or FIRST-LAST, from 1 to 256"),
    (("--methods", "pearl@257"), "pearl@257"),
    (("--methods", "autoregressive@3"), "autoregressive@3"),
    (("--batch", "1,x"), "--batch takes integers >= 1, separated by commas, not '1,x'"),
    (("--batch", "0"), "--batch"),
    (("--batch", "999999999"), "max_num_seqs"),
    (("--methods", "pearl@256", "--batch", "1,512"), "max_num_seqs=512 times a window of 256"),
    (("--window", "257"), "window must be"),
    (("--window", "0"), "window"),
    (("--window", "-1"), "window"),
    (("--window", "x"), "window"),
    (("--window", "3²"), "window"),
    (("--window", "9" * 5000), "window"),
    (("--json", "/no/such/folder/report.json"), "/no/such/folder"),
    (("--json", "/tmp"), "/tmp"),
    (("--plot", "speed.pdf"), "--plot draws .png and .svg"),
    (("--dataset", "nothing-of-the-sort"), "nothing-of-the-sort"),
    (("--verification", "trust"), "trust"),
    (("--device", "abacus"), "abacus"),
    (("--dtype", "int3"), "int3"),
    (("--shapes", "8b"), "TARGET:DRAFT, each one of tiny-target"),
    (("--shapes", "8b:9b"), "8b:9b"),
    (
        ("--shapes", "8b:1b", "--target", "some/model"),
        "--shapes makes random weights; it excludes --target and --draft",
    ),
    (("--shapes", "8b:1b", "--draft", "ngram"), "excludes --target and --draft"),
    (("--prompt-tokens", "5"), "--prompt-tokens is for random prompts"),
    (("--synthetic-acceptance", "0"), "--synthetic-acceptance must be above 0 and at most 1, not 0.0"),
    (("--synthetic-acceptance", "1.1"), "not 1.1"),
    (("--synthetic-acceptance", "nan"), "not nan"),
]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_refused_in_one_line_before_any_work(
    script: Script, arguments: tuple[str, ...], message: str
) -> None:
    finished = script(*arguments)
    assert finished.code != 0
    assert finished.out == ""
    assert re.fullmatch(r"error: .+\n", finished.err), finished.err
    assert message in finished.err


@pytest.mark.parametrize("option", ["--target", "--draft"])
def test_a_missing_model_is_refused_in_one_line_before_any_run(
    script: Script, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(contest, "compare", lambda *_: pytest.fail("something ran"))
    finished = script(option, "/no/such/model")
    assert finished.code != 0
    assert re.fullmatch(r"error: .*'/no/such/model'.+\n", finished.err), finished.err


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, "0") for option in ("--prompts", "--max-tokens", "--repeats", "--draft-threads")),
        ("--target-threads", "many"),
        ("--temperature", "-1"),
        ("--temperature", "nan"),
        ("--prompt-tokens", "99999999999999"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(script: Script, option: str, value: str) -> None:
    finished = script(option, value)
    assert finished.code == 2
    assert finished.out == ""
    assert option in finished.err


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_pearl_bench_refuses_the_same(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert run(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_pearl_bench_lists_the_same_options(script: Script) -> None:
    alone = script("--help")
    inside = CliRunner().invoke(application(), ["bench", "--help"], env={"COLUMNS": "200"})
    assert (alone.code, inside.exit_code) == (0, 0)
    options = set(re.findall(r"--[a-z][a-z-]+", alone.out))
    assert set(re.findall(r"--[a-z][a-z-]+", inside.output)) - {"--help"} == options - {
        "--help",
        "--install-completion",
        "--show-completion",
    }
    assert options >= {"--dataset", "--methods", "--window", "--ignore-eos", "--target", "--draft", "--json"}


def test_options_reach_the_library(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[dict[str, Any]] = []
    asked: list[tuple[Any, ...]] = []

    class Recorder:
        def __init__(self, **options: Any) -> None:
            built.append(options)

        def variant(self, **changes: Any) -> Recorder:
            return Recorder(**{**built[0], **changes})

        def __enter__(self) -> Recorder:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            pass

    def compare(contenders: dict[str, Any], prompts: list[str], params: Any, repeats: int, *more: Any) -> list[Any]:
        asked.append((list(contenders), prompts, params, repeats, more[-1]))
        return []

    monkeypatch.setattr(contest, "LLM", Recorder)
    monkeypatch.setattr(contest, "compare", compare)
    out = tmp_path / "report.json"
    finished = script(
        *("--methods", "pearl, autoregressive,pearl@balanced,speculative@20", "--window", "7"),
        *("--prompts", "3", "--batch", "2,18", "--waves", "1"),
        *("--temperature", "0.5", "--max-tokens", "9", "--ignore-eos", "--repeats", "4", "--draft", "ngram"),
        *("--draft-threads", "2", "--target-threads", "3", "--verification", "coupled", "--json", str(out)),
    )
    assert finished.code == 0, finished.err
    names = ["pearl", "autoregressive", "pearl@balanced", "speculative@20"]
    sixteen = load_prompts("builtin")
    assert len(sixteen) == 16
    small, (_, prompts, params, repeats, batch) = asked
    assert small == (names, sixteen[:3], params, 4, 2)
    assert (prompts, repeats, batch) == (sixteen + sixteen[:2], 4, 18), "repeated in turn, one for each place"
    assert "3 to 18 prompts (16 different), up to 9 tokens, batch 2, 18" in finished.out
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (0.5, 9, True)
    assert [options["method"] for options in built[1:]] == ["pearl", "autoregressive", "pearl", "speculative"] * 2
    assert [options["window"] for options in built[1:]] == [7, "auto", "auto", 20] * 2
    assert [options["pace"] for options in built[1:]] == ["auto", "auto", "balanced", "auto"] * 2
    assert [options["max_num_seqs"] for options in built[1:]] == [2] * 4 + [18] * 4
    assert {options["max_window"] for options in built[1:]} == {16}, (
        "no other contender's window limits the automatic one"
    )
    wanted = {"max_window": 20, "max_num_seqs": 18, "draft": "ngram", "verification": "coupled", "draft_threads": 2}
    assert {key: built[0][key] for key in wanted} == wanted
    assert built[0]["target_threads"] == 3
    settings = json.loads(out.read_text())["settings"]
    assert (settings["window"], settings["batch"], settings["ignore_eos"]) == ("7", [2, 18], True)
    assert (settings["methods"], settings["prompts"], settings["different_prompts"]) == (names, 3, 16)
    assert settings["shapes"] is settings["synthetic_acceptance"] is None
    assert "label" not in settings


def test_batches_follow_each_other_on_the_same_models(script: Script, tmp_path: Path) -> None:
    """Each has a baseline of its own; the report is whole after every run."""
    pytest.importorskip("matplotlib")
    out, picture, runs = tmp_path / "report.json", tmp_path / "speed.svg", []
    with pytest.MonkeyPatch.context() as patch:
        write = JsonReport.write

        def note(report: JsonReport, results: list[MethodResult], complete: bool = False) -> None:
            runs.append([(result.method, result.batch, result.runs) for result in results])
            write(report, results, complete)

        patch.setattr(JsonReport, "write", note)
        finished = script(
            "--methods", "autoregressive,pearl@3,pearl", "--batch", "1,3", "--prompts", "2", "--max-tokens", "8",
            "--waves", "2", "--repeats", "2", "--json", str(out), "--plot", str(picture),
        )  # fmt: skip
    assert finished.code == 0, finished.err
    names = ["autoregressive", "pearl@3", "pearl"]
    assert len(runs) == 2 * 6 + 1
    assert runs[2] == [(name, 1, 1) for name in names]
    assert runs[8] == [*((name, 1, 2) for name in names), *((name, 3, 1) for name in names)]
    report = json.loads(out.read_text())
    rows = report["results"]
    assert report["complete"] is True
    assert [(row["method"], row["batch"], row["prompts"]) for row in rows] == [
        *((name, 1, 2) for name in names), *((name, 3, 6) for name in names)
    ]  # fmt: skip
    assert [row["speedup"] for row in rows] == pytest.approx(
        [row["tok_s"] / rows[index // 3 * 3]["tok_s"] for index, row in enumerate(rows)]
    )
    assert all(row["spread"] >= 0 for row in rows)
    assert [row["modes"] for row in rows if row["method"] == "pearl@3"] == [{"pearl": 1}] * 2
    assert [row["window"] for row in rows if row["method"] == "pearl@3"] == [3, 3]
    assert {row["tokens"] for row in rows[:3]} == {rows[0]["tokens"]}
    assert f"written to {picture}" in finished.out
    assert "<!-- pearl at fixed windows -->" in picture.read_text("utf-8")


def test_a_picture_needs_matplotlib(script: Script, monkeypatch: pytest.MonkeyPatch, no_work: None) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    finished = script("--plot", "/tmp/speed.png")
    assert finished.code == 2
    assert finished.err == "error: --plot needs matplotlib: pip install matplotlib\n"


SHAPES = ("--shapes", "tiny-target:tiny-draft", "--device", "cpu")
LABEL = "synthetic acceptance 0.80: real forwards, scripted verdicts"


def test_random_weights_and_scripted_verdicts_say_so(script: Script, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    finished = script(
        *SHAPES, "--synthetic-acceptance", "0.8", "--prompts", "3", "--max-tokens", "120", "--repeats", "1",
        "--batch", "3", "--waves", "1", "--prompt-tokens", "20", "--window", "4", "--json", str(out),
    )  # fmt: skip
    assert finished.code == 0, finished.err
    label = f"tiny-target:tiny-draft, random weights, random prompts; {LABEL}"
    assert label in " ".join(finished.out.split())
    report = json.loads(out.read_text())
    assert report["settings"]["label"] == label
    wanted = {"shapes": "tiny-target:tiny-draft", "synthetic_acceptance": 0.8, "prompt_tokens": 20}
    assert wanted.items() <= report["settings"].items()
    assert report["settings"]["target"] == "tiny-target, random weights"
    plain, turns, pearl = report["results"]
    assert [row["tokens"] for row in (plain, turns, pearl)] == [360] * 3
    assert all(abs(row["acceptance_rate"] - 0.8) < 0.1 for row in (turns, pearl))
    assert pearl["target_forwards"] < plain["target_forwards"] == 360


def test_random_weights_alone_accept_next_to_nothing(script: Script, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    finished = script(*SHAPES, "--prompts", "1", "--max-tokens", "30", "--repeats", "1", "--json", str(out))
    assert finished.code == 0, finished.err
    report = json.loads(out.read_text())
    assert report["settings"]["label"] == "tiny-target:tiny-draft, random weights, random prompts"
    assert report["results"][2]["acceptance_rate"] < 0.2


def test_verdicts_of_real_models_can_be_scripted(script: Script, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    finished = script(
        "--methods", "pearl", "--synthetic-acceptance", "1", "--prompts", "1", "--max-tokens", "16", "--ignore-eos",
        "--repeats", "1", "--json", str(out),
    )  # fmt: skip
    assert finished.code == 0, finished.err
    report = json.loads(out.read_text())
    assert report["results"][0]["acceptance_rate"] == 1
    assert report["settings"]["label"] == LABEL.replace("0.80", "1.00")
    assert report["settings"]["target"] == "bundled"


def test_random_prompts_are_as_long_as_the_data_sets(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    built: list[EngineConfig] = []

    def compare(contenders: dict[str, LLM], prompts: list[Any], params: Any, *_: Any) -> list[Any]:
        asked.append((prompts, params))
        built.extend(llm.config for llm in contenders.values())
        return []

    monkeypatch.setattr(contest, "compare", compare)
    common = (*SHAPES, "--prompts", "3", "--max-tokens", "10", "--methods", "pearl", "--enforce-eager")
    assert script(*common, "--synthetic-acceptance", "0.5").code == 0
    assert script(*common, "--prompt-tokens", "33").code == 0
    (prompts, params), (others, one) = asked
    tokenizer = Tokenizer.from_pretrained(str(bundled_path("target")))
    assert [len(ids) for ids in prompts] == [len(tokenizer.encode(text)) for text in load_prompts("builtin", 3)]
    assert all(0 <= token < 512 for ids in prompts for token in ids)
    assert [p.seed for p in params] == [0, 1, 2], "scripted verdicts of one seed would be one luck for all"
    assert ([len(ids) for ids in others], one.seed) == ([33, 33, 33], 0)
    assert all(config.enforce_eager for config in built)
    assert [config.max_model_len for config in built] == [max(map(len, prompts)) + 10, 43]

"""The report: a table that can be read, JSON that comes back, and the machine it speaks of."""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_support import ROOT
from rich.console import Console

from pearl.bench import report
from pearl.bench.measure import MethodResult
from pearl.bench.report import JsonReport, commit, machine, table, versions, write_whole

PEARL = MethodResult(
    "pearl", 1, 8, 200, 0.5, 400.25, 0.0314, 2.5, 6.25, 0.875, 4.0, {"pearl": 1.0}, 60, 210, 0.934, 3
)  # fmt: skip
AUTOREGRESSIVE = MethodResult(
    "autoregressive", 1, 8, 200, 1.25, 160.1, None, 1.0, 0.0, 0.0, 0.0, {"autoregressive": 1.0}, 200, 0, 0.99, 3
)


def printed(*results: MethodResult, width: int = 200) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    console.print(table(results, "title"))
    assert isinstance(console.file, io.StringIO)
    return [line.strip() for line in console.file.getvalue().splitlines()]


def cells(*results: MethodResult, width: int = 200) -> list[list[str]]:
    names = ("method", *(result.method for result in results))
    return [line.split() for line in printed(*results, width=width) if line.startswith(names)]


def test_the_table_shows_every_measure() -> None:
    heads, row = cells(PEARL)
    assert heads == ["method", "tok/s", "spread", "speedup", "accepted", "rate", "fwd/tok", "window", "efficiency"]
    assert row == ["pearl", "400.2", "3.1%", "2.50x", "6.25", "0.875", "0.300", "4", "0.934"]


def test_what_does_not_draft_has_no_draft_columns() -> None:
    row = cells(AUTOREGRESSIVE, PEARL)[1]
    assert row == ["autoregressive", "160.1", "-", "1.00x", "-", "-", "1.000", "-", "0.990"]


def test_a_drafter_that_is_mostly_dry_has_them() -> None:
    assert cells(replace(PEARL, window=0.0))[1][5:8] == ["0.875", "0.300", "0"]


def test_a_result_without_tokens_is_shown_too() -> None:
    assert cells(replace(AUTOREGRESSIVE, tokens=0, tok_s=0.0))[1][6] == "-"


def test_what_prepared_windows_brought_is_below_the_table() -> None:
    ahead = replace(PEARL, method="pearl@4+2", prepared=40, prepared_hits=10, prepared_accepted=0.2)
    assert not any("prepared" in line for line in printed(PEARL))
    lines = [line for line in printed(PEARL, ahead) if "prepared" in line]
    assert lines == ["prepared by pearl@4+2 at batch 1: 25% hit, 20% of accepted tokens"]


def test_each_of_several_batches_has_a_section() -> None:
    four = [replace(result, batch=4) for result in (AUTOREGRESSIVE, PEARL)]
    assert not any(line.startswith("batch") for line in printed(AUTOREGRESSIVE, PEARL))
    starts = [line.split()[:2] for line in printed(AUTOREGRESSIVE, PEARL, *four) if line]
    names = [start for start in starts if start[0] in ("batch", "autoregressive", "pearl")]
    section = [["autoregressive", "160.1"], ["pearl", "400.2"]]
    assert names == [["batch", "1"], *section, ["batch", "4"], *section]


def test_what_a_pace_chose_is_told_where_it_left_the_method_s_own_mode() -> None:
    chosen = replace(PEARL, batch=64, modes={"autoregressive": 0.9, "pearl": 0.1})
    fixed = replace(PEARL, method="pearl@4")
    told = [line for line in printed(AUTOREGRESSIVE, PEARL, fixed, chosen, width=80) if line.startswith("rounds of")]
    assert told == ["rounds of pearl at batch 64: autoregressive 90%, pearl 10%"]


def test_what_a_pace_reaches_is_told_beside_the_others_of_its_batch() -> None:
    auto, fixed = replace(PEARL, speeds=[95.0, 99.0]), replace(PEARL, method="pearl@4", speeds=[100.0, 100.0])
    rows = [replace(AUTOREGRESSIVE, speeds=[50.0, 50.0]), fixed, auto, replace(fixed, batch=4, speeds=[900.0, 900.0])]
    told = [line for line in printed(*rows, width=80) if "of the best" in line]
    assert told == ["pearl at batch 1: 0.97 (0.96-0.98) of the best by other repeats, pearl@4"]


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    """Nothing is cut: what it prints is copied into documents and logs."""
    fast = replace(
        PEARL, method="speculative@256", tok_s=12345.6, spread=0.123, speedup=12.5, mean_accepted_tokens=123.25,
        window=12.5,
    )  # fmt: skip
    assert cells(AUTOREGRESSIVE, fast, width=80) == cells(AUTOREGRESSIVE, fast)


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    settings = {"dataset": "b\u00e4ume", "window": "auto", "temperature": 0.0, "ignore_eos": False}
    report = JsonReport(path, settings)
    report.write([AUTOREGRESSIVE])
    read = json.loads(path.read_text())
    assert (read["complete"], len(read["results"])) == (False, 1)
    report.write([AUTOREGRESSIVE, PEARL], complete=True)
    read = json.loads(path.read_text())
    assert read["complete"] is True
    assert [MethodResult(**row) for row in read["results"]] == [AUTOREGRESSIVE, PEARL]
    assert read["settings"] == settings
    assert read["machine"] == machine()
    assert read["versions"] == versions()
    assert read["commit"] == commit()
    assert len(read) == 6


def test_the_machine_is_described() -> None:
    found = machine()
    assert found["cpu"].strip()
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert platform.system() in found["system"]
    json.dumps(found)


def test_versions_are_those_of_the_packages() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"] == torch.__version__
    assert {"pearl-engine", "transformers"} <= set(found)


def test_a_report_is_written_whole_where_links_and_pipes_point(tmp_path: Path) -> None:
    file, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(file)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(link, "first")
    write_whole(pipe, "second")
    assert (link.is_symlink(), file.read_text(), os.read(reader, 99)) == (True, "first", b"second")
    os.close(reader)
    assert sorted(tmp_path.iterdir()) == [file, link, pipe]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "report.json"
    with pytest.raises(OSError, match="No such file") as failed:
        write_whole(path, "x")
    assert failed.value.filename == str(path)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Someone else's checkout, with one commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *arguments], check=True)
    return tmp_path


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or not Path(report.__file__).is_relative_to(ROOT / "pearl"), reason="not a checkout"
)
def test_the_commit_is_the_checkout_s() -> None:
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert (found := commit()) is not None
    assert head.stdout.startswith(found.removesuffix("-dirty").rpartition("-g")[2])


def test_an_installed_copy_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    assert commit() is None


def test_a_copy_installed_inside_another_checkout_has_no_commit(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtual environment often lies in the user's own repository, whose commit says nothing of PEARL."""
    folder = repository / ".venv" / "site-packages" / "pearl" / "bench"
    folder.mkdir(parents=True)
    (folder / "report.py").touch()
    monkeypatch.setattr(report, "__file__", str(folder / "report.py"))
    assert commit() is None


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() is None

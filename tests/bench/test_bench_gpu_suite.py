"""``bench/gpu_suite.sh``: what becomes of stages that fail or are cut off, of what they start, and of signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bench_support import ROOT

from bench.gpu_suite.outcome import CUT_OFF, FAILED, OK, SKIPPED
from bench.gpu_suite.process import run_limited
from bench.gpu_suite.stages import Command, Place, Stage
from bench.gpu_suite.suite import Stop, run_stage


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(ROOT, tmp_path / "out", tmp_path / "work")
    place.log("").parent.mkdir(parents=True)
    return place


def python(code: str, name: str = "it", **options: Any) -> Command:
    return Command(name, (sys.executable, "-c", code), **options)


def alive(pid: int) -> bool:
    """A zombie has ended; whoever inherits it reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.02)


# Writes what it has when it is interrupted, as pytest does, and leaves a child that ignores everything.
SLOW = """
import json, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"],
    stdout=subprocess.PIPE)
child.stdout.readline()
pathlib.Path(sys.argv[1]).write_text(json.dumps({"child": child.pid}))
try:
    time.sleep(60)
except KeyboardInterrupt:
    pathlib.Path(sys.argv[1]).write_text(json.dumps({"child": child.pid, "saved": True}))
"""


def slow(file: Path) -> Command:
    return Command("slow", (sys.executable, "-c", SLOW, str(file)))


def test_a_stage_cut_off_at_its_limit_keeps_its_results_and_leaves_no_orphan(place: Place) -> None:
    stage = Stage("slow", 4.0, (slow(place.file("part.json")), python("print('never')")), ("part.json",))
    begin = time.monotonic()
    outcome = run_stage(stage, 4.0, place, Stop())
    assert time.monotonic() - begin < 5
    assert outcome.status == CUT_OFF
    assert outcome.reason == "slow was cut off by its limit of 4 s; 1 of 2 commands did not begin"
    part = json.loads(place.file("part.json").read_text())
    assert part["saved"], "it was asked to end before it was killed"
    until(lambda: not alive(part["child"]))


def test_what_a_command_leaves_running_ends_with_it(tmp_path: Path) -> None:
    code = "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid)"
    log = tmp_path / "log"
    ended = run_limited((sys.executable, "-c", code), log, 20, cwd=tmp_path, environment=os.environ)
    assert ended.ok
    command, pid = log.read_text().splitlines()
    assert command.startswith(f"$ {sys.executable} -c ")
    until(lambda: not alive(int(pid)))


def test_a_command_that_takes_no_hint_is_killed_at_the_limit(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    ended = run_limited((sys.executable, "-c", code), tmp_path / "log", 2.0, cwd=tmp_path, environment=os.environ)
    assert 1.9 < ended.seconds < 2.6
    assert (ended.code, ended.cut_off) == (-signal.SIGKILL, "its limit of 2 s")


def test_a_program_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    ended = run_limited(("/no/such/program",), tmp_path / "log", 2.0, cwd=tmp_path, environment=os.environ)
    assert (ended.code, ended.ok) == (127, False)
    assert "/no/such/program" in (tmp_path / "log").read_text().splitlines()[-1]


def test_a_command_that_fails_does_not_stop_the_next(place: Place) -> None:
    file = place.file("a.json")
    stage = Stage("two", 9, (python("raise SystemExit('no luck')", "bad"), python(f"open({str(file)!r}, 'w')", "good")))
    outcome = run_stage(stage, 9.0, place, Stop())
    assert (outcome.status, len(outcome.commands)) == (FAILED, 2)
    assert outcome.reason.startswith("bad ended with status 1; the log ends with: ")
    assert file.exists()


def test_packages_that_were_carried_along_are_found(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wheels unpacked beside the checkout are put on PYTHONPATH by whoever starts the suite."""
    monkeypatch.setenv("PYTHONPATH", "/tmp/carried")
    run_stage(Stage("path", 9, (python("import os; print(os.environ['PYTHONPATH'])"),)), 9.0, place, Stop())
    assert place.log("path").read_text().splitlines()[-1] == f"{ROOT}{os.pathsep}/tmp/carried"


def test_results_of_an_earlier_run_are_not_taken_for_this_one(place: Place) -> None:
    place.file("latency-8b-1b.json").write_text('{"cells": [{"decode_ms": 1.0}]}')
    outcome = run_stage(Stage("latency", 9, (python("pass"),), ("latency-8b-1b.json",)), 9.0, place, Stop())
    assert (outcome.status, outcome.reason) == (FAILED, "it wrote no results")


def test_results_that_are_not_as_expected_cost_one_stage_only(place: Place) -> None:
    code = f"open({str(place.file('greedy.json'))!r}, 'w').write('{{\"agrees\": true}}')"
    outcome = run_stage(Stage("agreement", 9, (python(code),), ("greedy.json",)), 9.0, place, Stop())
    assert (outcome.status, outcome.reason) == (FAILED, "its results are not as expected: KeyError('settings')")


# ---- the script -----------------------------------------------------------------------------------------------------


def suite(*arguments: str, out: Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    return subprocess.Popen(
        ["bash", str(ROOT / "bench" / "gpu_suite.sh"), *arguments, "--work", str(out / "work")], env=environment,
        text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


def test_a_dry_run_of_one_stage_says_what_it_is_everywhere(tmp_path: Path) -> None:
    code, shown, error = finished(suite("--dry-run", "--only", "environment", out=tmp_path))
    assert (code, error) == (0, "")
    assert "environment: ok" in shown
    content = json.loads((tmp_path / "summary.json").read_text())
    assert content["title"].startswith("DRY RUN")
    assert content["dry_run"] is True
    (stage,) = content["stages"]
    assert (stage["name"], stage["status"]) == ("environment", OK)
    assert stage["numbers"]["packages"]["torch"]
    assert stage["numbers"]["providers"]["cpu"]["verify"]
    assert (tmp_path / "summary.md").read_text().startswith("# DRY RUN")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        *("results.tar.gz", "summary.json", "summary.md")
    ]
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        packed = {member.name for member in archive if member.isfile()}
        log = archive.extractfile("logs/environment.log")
        assert log is not None
        assert log.read().startswith(b"DRY RUN\n")
    assert {"dry-run-environment.json", "dry-run-providers.json", "outcomes.json"} <= packed


def test_a_folder_that_cannot_be_is_refused_in_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    environment = {**os.environ, "OUT": str(file), "PYTHON": sys.executable}
    script = ["bash", str(ROOT / "bench" / "gpu_suite.sh"), "--only", "environment"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    error = done.stderr
    assert (done.returncode, done.stdout) == (2, "")
    assert error.startswith("gpu_suite.sh: error: OUT: ")
    assert str(file) in error


# The real suite, with a stage that a test can watch.
SUITE = """
import sys
from bench.gpu_suite import suite
from bench.gpu_suite.stages import Command, Stage
child = Command("slow", (sys.executable, "-c", sys.argv[1], sys.argv[2]))
made = (Stage("build", 9, ()), Stage("slow", 60, (child,)), Stage("later", 60, ()))
suite.stages = lambda place, compute_capability="": made
sys.exit(suite.main(["--dry-run", "--work", sys.argv[3], "--only", "slow,later"]))
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_runs_and_writes_the_summary(tmp_path: Path, number: signal.Signals, status: int) -> None:
    file = tmp_path / "part.json"
    process = subprocess.Popen(
        [sys.executable, "-c", SUITE, SLOW, str(file), str(tmp_path / "work")], cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    until(file.exists)
    until(lambda: bool(file.read_text()))
    process.send_signal(number)
    code, _, error = finished(process)
    assert (code, error) == (status, "")
    part = json.loads(file.read_text())
    assert part["saved"]
    until(lambda: not alive(part["child"]))
    content = json.loads((tmp_path / "summary.json").read_text())
    states = {stage["name"]: (stage["status"], stage["reason"]) for stage in content["stages"]}
    assert states["slow"] == (CUT_OFF, "slow was cut off by an interruption")
    assert states["later"] == (SKIPPED, "the suite was interrupted")
    assert content["ok"] is False
    assert "| later | skipped |" in (tmp_path / "summary.md").read_text()
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        assert "logs/slow.log" in archive.getnames()


def test_the_suite_starts_where_no_package_works(tmp_path: Path) -> None:
    """Torch that cannot be imported is found out by the suite, not suffered."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('broken')")
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHONPATH": str(tmp_path)}
    path = str(ROOT)
    code = f"import sys; sys.path.append({path!r}); import bench.gpu_suite.suite; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"

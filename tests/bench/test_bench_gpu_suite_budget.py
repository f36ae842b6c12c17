"""``bench/gpu_suite.sh`` within its budget: stages that overrun, and a second command that does the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from sysconfig import get_config_var
from typing import Any

import pytest
from bench_support import ROOT

from bench.gpu_suite import process
from bench.gpu_suite.archive import pack
from bench.gpu_suite.outcome import CUT_OFF, FAILED, OK, SKIPPED, Outcome, keep, kept
from bench.gpu_suite.process import Ended, run_limited
from bench.gpu_suite.stages import Place
from bench.gpu_suite.suite import _checked_build

# Stages as the real ones, of commands made here: (name, limit, least, code), run by the suite as it is.
SUITE = """
import json, sys
from bench.gpu_suite import suite
from bench.gpu_suite.stages import Command, Stage
made = tuple(Stage(name, limit, (Command(name, (sys.executable, "-c", code)),), least=least, on_gpu=False)
             for name, limit, least, code in json.loads(sys.argv[1]))
suite.stages = lambda place, compute_capability="": made
sys.exit(suite.main(sys.argv[2:]))
"""
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
QUICK = "print('quick')"


@dataclass(frozen=True)
class Run:
    seconds: float
    code: int
    shown: str
    summary: dict[str, Any]

    @property
    def states(self) -> dict[str, str]:
        return {stage["name"]: stage["status"] for stage in self.summary["stages"]}


def run(folder: Path, stages: list[tuple[str, float, float, str]], *arguments: str) -> Run:
    """In a folder of its own; a machine empties $OUT before each command."""
    out = folder / f"out-{time.monotonic_ns()}"
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SUITE, json.dumps(stages), "--dry-run", "--work", str(folder / "work"), *arguments],
        cwd=ROOT, env={**os.environ, "OUT": str(out)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    seconds = time.monotonic() - begin
    assert not done.stderr
    assert {path.name for path in out.iterdir()} == {"summary.json", "summary.md", "results.tar.gz"}
    return Run(seconds, done.returncode, done.stdout, json.loads((out / "summary.json").read_text()))


def test_stages_that_overrun_leave_the_others_their_time_and_end_in_the_budget(tmp_path: Path) -> None:
    stages = [("first", 3.0, 1.0, DEAF), ("second", 2.0, 1.0, QUICK), ("third", 2.0, 1.0, DEAF), ("late", 9, 8, QUICK)]
    done = run(tmp_path, stages, "--budget", "8")
    assert done.seconds < 8
    assert done.code == 1
    assert done.states == {"first": CUT_OFF, "second": OK, "third": CUT_OFF, "late": SKIPPED}
    late = done.summary["stages"][-1]["reason"]
    assert late.endswith(" s of the budget are left, it needs 8")
    assert "bash bench/gpu_suite.sh --only first,third,late" in done.shown
    with tarfile.open(next(tmp_path.glob("out-*")) / "results.tar.gz") as archive:
        assert {"logs/first.log", "logs/third.log", "outcomes.json"} <= set(archive.getnames())


def test_a_second_command_does_the_rest_and_hands_over_everything(tmp_path: Path) -> None:
    mark = tmp_path / "runs"
    once = f"open({str(mark)!r}, 'a').write('first ')"
    stages = [("first", 5.0, 1.0, once), ("second", 9.0, 30.0, QUICK), ("third", 5.0, 1.0, QUICK)]
    assert run(tmp_path, stages, "--budget", "9").states == {"first": OK, "second": SKIPPED, "third": OK}
    stages[1] = ("second", 9.0, 1.0, QUICK)
    rest = run(tmp_path, stages, "--from", "second")
    assert (rest.code, rest.states) == (0, {"first": OK, "second": OK, "third": OK})
    assert mark.read_text() == "first ", "it was not run again"
    assert run(tmp_path, stages, "--only", "third").states == {"first": OK, "second": OK, "third": OK}
    text = next(iter(sorted(tmp_path.glob("out-*"))[-1:])).joinpath("summary.md").read_text()
    assert f"| first | ok | 0 | {rest.summary['date'][:10]}" in text, "what an earlier command found out has its date"
    assert run(tmp_path, stages).states == {"first": OK, "second": OK, "third": OK}
    assert mark.read_text() == "first first ", "without --from and --only all is new"


def test_outcomes_of_another_version_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.json"
    outcome = Outcome("a", OK, 1.5, "why", (Ended(("x", "y"), 0, 1.25),), "2026-01-01", "abc")
    keep(file, [outcome])
    assert kept(file) == [outcome]
    file.write_text('[{"name": "a", "commands": [], "magic": 1}]')
    assert kept(file) == []
    assert kept(tmp_path / "none") == []


@pytest.fixture
def place(tmp_path: Path) -> Place:
    root = tmp_path / "root"
    for folder in ("csrc/cuda", "pearl_kernels/cpu", "pearl_kernels/cuda", "work"):
        (root / folder).mkdir(parents=True)
    (root / "CMakeLists.txt").write_text("project(x)")
    (root / "csrc/cuda/a.cu").write_text("one")
    return Place(root, tmp_path, root / "work")


def test_what_was_built_from_these_sources_is_not_built_again(place: Place) -> None:
    suffix = get_config_var("EXT_SUFFIX")
    place.note_built()
    assert not place.built, "no module is there"
    for folder in ("cpu", "cuda"):
        (place.root / "pearl_kernels" / folder / f"_{folder}.cpython-27-x86_64-linux-gnu.so").touch()
    assert not place.built, "another Python's modules are"
    for folder in ("cpu", "cuda"):
        (place.root / "pearl_kernels" / folder / f"_{folder}{suffix}").touch()
    assert place.built
    source = place.root / "csrc/cuda/a.cu"
    os.utime(source, (1, 1))
    assert place.built, "a copy of the checkout has other times"
    source.write_text("two")
    assert not place.built


def test_a_build_without_cuda_kernels_is_no_success(place: Place) -> None:
    (place.root / "pearl_kernels" / "cpu" / f"_core{get_config_var('EXT_SUFFIX')}").touch()
    outcome = _checked_build(Outcome("build", OK, 9.0), place)
    assert (outcome.status, outcome.reason) == (FAILED, "not all modules were built: see the log")
    (place.root / "pearl_kernels" / "cuda" / f"_cuda{get_config_var('EXT_SUFFIX')}").touch()
    assert _checked_build(Outcome("build", OK, 9.0), place).status == OK


def test_the_archive_is_never_too_large(tmp_path: Path) -> None:
    folder, archive = tmp_path / "results", tmp_path / "results.tar.gz"
    (folder / "logs").mkdir(parents=True)
    (folder / "small.json").write_text("{}")
    (folder / "noise.bin").write_bytes(os.urandom(20_000))
    (folder / "logs" / "long.log").write_text("again\n" * 100_000)
    assert pack(folder, archive, largest=1 << 20) == []
    assert pack(folder, archive, largest=10_000) == ["logs/long.log", "noise.bin"]
    assert archive.stat().st_size <= 10_000
    with tarfile.open(archive) as packed:
        assert packed.getnames() == ["small.json"]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["results.tar.gz"]


def test_what_does_not_even_die_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that waits for a GPU that hangs: signals do nothing."""
    monkeypatch.setattr(process, "_DYING", 0.2)
    monkeypatch.setattr(process, "_signal_group", lambda group, number: None)
    begin = time.monotonic()
    argv = (sys.executable, "-c", "import time; time.sleep(4)")
    ended = run_limited(argv, tmp_path / "log", 1.0, cwd=tmp_path, environment=os.environ)
    assert time.monotonic() - begin < 2
    assert (ended.ok, ended.cut_off) == (False, "its limit of 1 s")

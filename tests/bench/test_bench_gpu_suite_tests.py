"""The tests that the GPU suite runs: which they are, what they need, and what becomes of them after one broke CUDA."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from bench_support import ROOT

from bench.gpu_suite.stages import GPU_TESTS

# Hides packages that a bare GPU machine may lack: it has torch, triton, transformers, numpy, pytest and their needs.
BARE = """
import importlib.util, sys
ABSENT = "datasets gguf hypothesis matplotlib pybind11 pytest_benchmark rich scipy typer xdist".split()
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in ABSENT else find(name, package)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
SUPPORT = ROOT / "tests" / "ops" / "ops_support.py"  # marks parameters of the tests beside it


def pytest_in(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """With the plugins that are named only; ``folder`` is on the path."""
    path = os.pathsep.join((str(ROOT), str(folder)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **environment},
    )  # fmt: skip


def test_every_test_for_a_gpu_is_among_those_that_the_suite_collects() -> None:
    marked = [path for path in (ROOT / "tests").rglob("*.py") if re.search(r"pytest\.mark\.gpu\b", path.read_text())]
    names = {str(path.relative_to(ROOT)) for path in marked if path != Path(__file__)}
    assert len(names) >= 5
    assert str(SUPPORT.relative_to(ROOT)) in names
    left_out = [name for name in names if not any(name == test or name.startswith(f"{test}/") for test in GPU_TESTS)]
    assert not left_out
    assert all((ROOT / test).exists() for test in GPU_TESTS)


def test_a_bare_machine_collects_them_and_knows_those_that_run_alone(tmp_path: Path) -> None:
    """Without packages that only some of them need: an import that fails would fail the whole stage."""
    (tmp_path / "bare_machine.py").write_text(BARE)
    tests = (*GPU_TESTS, "tests/emulated/test_emulated_attention.py")
    found = pytest_in(tmp_path, "-p", "bare_machine", "--collect-only", "-m", "gpu and alone", *tests)
    assert found.returncode == 0, found.stdout + found.stderr
    alone = {line.rpartition("::")[2] for line in found.stdout.splitlines() if "::" in line}
    assert alone == {
        "test_the_models_work_at_the_same_time",
        "test_a_gpu_is_filled_and_still_works",
        "test_a_gpu_reads_faster_than_a_cpu_thread",
    }


# A torch whose GPU breaks in the second test, and notices when it is waited for.
TORCH = """
class cuda:
    broken = False
    is_initialized = staticmethod(lambda: True)
    @classmethod
    def synchronize(cls):
        if cls.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""
TESTS = """
import torch
def test_first(): pass
def test_breaks(): torch.cuda.broken = True
def test_third(): raise AssertionError("it should not have been run")
def test_fourth(): raise AssertionError("it should not have been run")
"""


def test_after_one_that_breaks_the_context_tests_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_it.py").write_text(TESTS)
    rooted = ("--rootdir", str(tmp_path), "-c", os.devnull)
    done = pytest_in(tmp_path, "-p", "bench.gpu_suite.broken_context", "-rs", *rooted, str(tmp_path / "test_it.py"))
    assert "2 passed, 2 skipped, 1 error" in done.stdout
    assert "an illegal memory access" in done.stdout
    assert "the CUDA context of this process was broken by test_it.py::test_breaks" in done.stdout.replace("\n", " ")


def test_the_plugin_costs_tests_without_torch_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    rooted = ("--rootdir", str(tmp_path), "-c", os.devnull)
    done = pytest_in(tmp_path, "-p", "bench.gpu_suite.broken_context", *rooted, str(tmp_path / "test_it.py"))
    assert "1 passed" in done.stdout

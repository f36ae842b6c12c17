"""``pytest bench``: what a benchmark of a kernel reports, and that it reports nothing of a kernel that is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bench_support import ROOT

COPY_AND_NORM = "copy_blocks or (rms_norm and not add)"


def bench(*arguments: str, folder: str = "bench") -> subprocess.CompletedProcess[str]:
    """Kernels run natively there: Triton's interpreter, which these tests run under, is off."""
    # A benchmark is measured even if this test is one of several that run at once.
    ours = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    line = [sys.executable, "-m", "pytest", folder, "-p", "no:cacheprovider", "--device", "cpu", *arguments]
    return subprocess.run(
        line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What the terminal shows, and extra_info of every benchmark."""
    out = tmp_path_factory.mktemp("kernels") / "report.json"
    shown = bench("--benchmark-only", "--shapes", "tiny", "-k", COPY_AND_NORM, f"--benchmark-json={out}")
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return shown.stdout, [b["extra_info"] for b in json.loads(out.read_text())["benchmarks"]]


def test_every_provider_and_what_a_user_would_call_are_measured(report: tuple[str, list[dict[str, Any]]]) -> None:
    found = {(info["op"], info["contender"], info["role"]) for info in report[1]}
    for op in ("rms_norm", "copy_blocks"):
        assert {(op, "cpu", "provider"), (op, "reference", "provider")} <= found
        assert any(name == op and role == "rival" for name, _, role in found)
    assert not [name for _, name, _ in found if name in ("triton", "cuda")], "no GPU kernel runs on CPU tensors"


def test_the_numbers_agree_with_each_other(report: tuple[str, list[dict[str, Any]]]) -> None:
    for info in report[1]:
        assert info["gb_s"] == pytest.approx(info["bytes"] / info["seconds"] / 1e9)
        assert info["share_of_limit"] == pytest.approx(info["gb_s"] / info["limit_gb_s"])
        assert 0 < info["seconds"] < 1
        assert info["limit_gb_s"] > 0.1
        assert info["checked"] is True
        assert info["device"].strip()


def test_the_bytes_are_the_least_that_must_move(report: tuple[str, list[dict[str, Any]]]) -> None:
    moved = {info["op"]: (info["shape"], info["bytes"]) for info in report[1]}
    assert moved["rms_norm"] == ("3x96", (3 * 96 + 3 * 96 + 96) * 2)  # x, out, weight in bf16
    assert moved["copy_blocks"] == ("2 of 8 pages", 2 * 2 * 16 * 8 * 128 * 2)  # read and written


def test_the_terminal_shows_a_table(report: tuple[str, list[dict[str, Any]]]) -> None:
    text, infos = report
    assert "6 passed" in text
    (line,) = [line for line in text.splitlines() if "cache[b] = cache[a]" in line]
    (info,) = [info for info in infos if info["contender"] == "cache[b] = cache[a]"]
    assert f"{info['seconds'] * 1e6:,.1f}" in line
    assert re.search(r"copy_blocks +2 of 8 pages +bfloat16 +cpu +[\d.]+", text)


def test_only_kernels_are_collected() -> None:
    """bench/ also holds programs; importing them would start them."""
    shown = bench("--collect-only", "-q", "--shapes", "tiny")
    ids = [line for line in shown.stdout.splitlines() if "::" in line]
    assert len(ids) > 20
    assert all(line.startswith("bench/kernels/test_kernel_") for line in ids)


WRONG = """
import pytest
from bench.kernels.kernel_bench import plain, rival
from bench.kernels.test_kernel_layers import Rows, test_rms_norm as real

def off_by_one(x, weight, eps):
    return x + 1

@pytest.mark.kernel("rms_norm", shapes={"tiny": [Rows(2, 8)]}, rivals=[rival("wrong", plain(off_by_one))])
def test_wrong(bench, shape, contender):
    real(bench, shape, contender)
"""


def test_a_wrong_result_is_no_measurement(tmp_path: Path) -> None:
    for name in ("conftest.py", "kernels/conftest.py"):
        copy = tmp_path / name
        copy.parent.mkdir(exist_ok=True)
        copy.write_text((ROOT / "bench" / name).read_text())
    (tmp_path / "kernels" / "test_wrong.py").write_text(WRONG)
    out = tmp_path / "report.json"
    shown = bench("--shapes", "tiny", "-k", "test_wrong", f"--benchmark-json={out}", folder=str(tmp_path))
    assert shown.returncode == 1, shown.stdout
    assert "1 failed" in shown.stdout
    assert "Tensor-likes are not close" in shown.stdout
    names = [b["extra_info"].get("contender") for b in json.loads(out.read_text())["benchmarks"]]
    assert "cpu" in names
    assert "wrong" not in names


@pytest.mark.parametrize("arguments", [("--shapes", "huge"), ("--device", "abacus")])
def test_unknown_choices_are_refused(arguments: tuple[str, str]) -> None:
    shown = bench(*arguments, "--collect-only")
    assert shown.returncode == 4
    assert arguments[1] in shown.stderr

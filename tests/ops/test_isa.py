"""The C++ core's other instruction sets: a process chooses one at its start, so each has its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pearl_kernels.cpu import _core

HERE = Path(__file__).parent
MODULES = (
    *("test_layers", "test_linear", "test_linear_int8", "test_linear_groups", "test_rope_and_cache", "test_attention"),
    *("test_sample", "test_sample_alternatives", "test_verify", "test_philox"),
)
# Parametrised with the cpu provider on CPU tensors, or of the core alone: no reference, no other provider, no GPU.
# Left out are the two dtypes of draft and target, which each instruction set loads with the same two functions.
OF_THE_CORE = "(cpu-cpu or core) and not fp32-bf16 and not bf16-fp32"
NEEDS = {  # flags of /proc/cpuinfo. The widest that can run, amx or avx512bf16, runs the tests of this process
    "scalar": (),
    "avx2": ("avx2", "fma"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512bf16": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"),
}
RUN_TESTS = (
    "import sys, pytest; from pearl_kernels.cpu import _core; print('isa', _core.isa()); sys.exit(pytest.main())"
)
EXPLAIN = "from pearl_kernels.registry import explain; print(explain('sample'))"


def python(program: str, isa: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PEARL_CPU_ISA": isa} | environment
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=env, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300)


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    if platform.machine().lower() not in ("x86_64", "amd64") or not info.exists():
        return set()
    flags = [line for line in info.read_text().splitlines() if line.startswith("flags")]
    return set(flags[0].split())


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in NEEDS if isa != _core.isa()])  # this process's tests run with that one
def test_the_operator_tests_pass_with(isa: str) -> None:
    """Or, where the CPU lacks its instructions, asking for it is an error."""
    if set(NEEDS[isa]) - cpu_flags():
        assert_refused(isa)
        return
    modules = " ".join(f"tests/ops/{name}.py" for name in MODULES)
    done = python(RUN_TESTS, isa, PYTEST_ADDOPTS=f"-q -x -p no:cacheprovider -k '{OF_THE_CORE}' {modules}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert done.stdout.startswith(f"isa {isa}\n")
    passed = done.stdout.splitlines()[-1].split(" passed")[0]
    assert int(passed) > 300, done.stdout[-1000:]  # the selection still selects


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "scalar "])
def test_an_instruction_set_that_is_not_there_is_a_clear_error(isa: str) -> None:
    assert_refused(isa)


def assert_refused(isa: str) -> None:
    """With no silent fallback to another one, or to the reference."""
    done = python(EXPLAIN, isa)
    assert done.returncode != 0
    assert f"RuntimeError: PEARL_CPU_ISA={isa} cannot run on this CPU; it has: " in done.stderr
    assert done.stderr.rstrip().endswith("scalar")


def test_an_empty_value_is_none() -> None:
    done = python(EXPLAIN, "")
    assert done.returncode == 0, done.stderr
    assert "first that can run" in done.stdout

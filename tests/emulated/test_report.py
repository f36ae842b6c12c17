"""``python -m pearl_kernels.report``: what compilers say is read rightly, and what must fail the report does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from pearl_kernels import Situation, explain, triton
from pearl_kernels.registry import OPERATORS
from pearl_kernels.report.__main__ import application
from pearl_kernels.report.cuda_compile import SOURCES, kernel_names, short_name
from pearl_kernels.report.resources import ARCHITECTURES, Compiled, Usage, add_launch, read_log
from pearl_kernels.report.triton_jobs import TritonProcess, triton_jobs

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'plain' for 'sm_90'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 20 registers, used 0 barriers, 368 bytes cmem[0]
ptxas info    : Compile time = 4.059 ms
ptxas-blackwell info    : Compiling entry function 'shares' for 'sm_100'
ptxas-blackwell info    : Function properties for shares
    360 bytes stack frame, 472 bytes spill stores, 496 bytes spill loads
ptxas-blackwell info    : Used 64 registers, used 1 barriers, 360 bytes cumulative stack size, 4096 bytes smem
ptxas info    : Compiling entry function 'calls' for 'sm_80'
ptxas info    : Function properties for calls
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Function properties for callee
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 2 barriers, 128 bytes smem, 408 bytes cmem[0]
"""

PTX = """\
.extern .shared .align 16 .b8 _ZN5pearl6shared_E[];
.visible .entry plain(
    .param .u64 plain_param_0,
    .param .u32 plain_param_1
)
{
    ret;
}
.entry shares()
.maxntid 128, 2, 1
.minnctapersm 4
{
    mov.u32 %r1, _ZN5pearl6shared_E;
    ret;
}
.visible .entry calls(.param .u64 .ptr .global .align 1 calls_param_0)
.reqntid 256
{
    ret;
}
"""


def test_the_assembler_s_log_is_read() -> None:
    assert read_log(LOG) == {
        "plain": Usage(20),
        "shares": Usage(64, stack=360, spilled=968, static_shared=4096),
        "calls": Usage(255, stack=16, spilled=12, static_shared=128),
    }
    assert read_log("") == {}


def test_ptx_tells_threads_and_whether_the_launch_sizes_shared_memory() -> None:
    kernels = add_launch(read_log(LOG), PTX)
    assert {name: (k.threads, k.dynamic_shared) for name, k in kernels.items()} == {
        "plain": (None, 0),
        "shares": (256, None),
        "calls": (256, 0),
    }
    assert [k.exact for k in kernels.values()] == [False, False, True]


@pytest.mark.parametrize(
    ("usage", "warps"),
    [
        (Usage(32, threads=256), {80: 64, 90: 64, 100: 64}),
        (Usage(40, threads=256), {90: 48}),  # 51 warps by registers, 48 by fours, six blocks of eight
        (Usage(255, threads=128), {90: 8}),
        (Usage(16, threads=32), {90: 32}),  # 32 blocks at most
        (Usage(32, static_shared=1024, dynamic_shared=99 * 1024, threads=128), {80: 4, 90: 8, 100: 8}),
        (Usage(32, dynamic_shared=163 * 1024, threads=128), {80: 4, 90: 4}),
        (Usage(32, dynamic_shared=163 * 1024 + 1, threads=128), {80: 0, 90: 4}),
        (Usage(32, dynamic_shared=227 * 1024 + 1, threads=128), {90: 0, 100: 0}),
        (Usage(128, threads=1024), {90: 0}),  # 131072 registers
        (Usage(56), {90: 36}),
        (Usage(56, static_shared=2048, dynamic_shared=None), {90: 36}),
        (Usage(0, threads=1024), {80: 64}),
    ],
)
def test_occupancy(usage: Usage, warps: dict[int, int]) -> None:
    assert {arch: usage.warps(arch) for arch in warps} == warps


def test_what_is_a_problem() -> None:
    fine, spilling = Usage(32, threads=128), Usage(255, stack=8, spilled=24, threads=128)
    assert Compiled("k", 90, 0.0, fine).problem is None
    assert Compiled("k", 90, 0.0, spilling, spills="the tile is wide").problem is None
    assert "8 bytes of stack, 24 of spills" in (Compiled("k", 90, 0.0, spilling).problem or "")
    assert Compiled("k", 90, 0.0, Usage(32, stack=8, threads=128)).problem is not None
    assert Compiled("k", 90, 0.0, error="undefined", spills="the tile is wide").problem == "undefined"
    too_much = Usage(32, dynamic_shared=200 * 1024, threads=128)
    assert Compiled("k", 80, 0.0, too_much).problem == "no block fits a multiprocessor of sm_80"
    assert Compiled("k", 90, 0.0, too_much).problem is None


@pytest.mark.parametrize(
    ("signature", "name"),
    [
        ("pearl::cuda::plain(float const*, float (*) [3])", "plain"),
        ("void pearl::cuda::(anonymous namespace)::f<__nv_bfloat16, 4>(__nv_bfloat16*, int)", "f<__nv_bfloat16, 4>"),
        ("void f<pearl::(anonymous namespace)::Op, (pearl::DType)1>(void (*)(int))", "f<Op, (DType)1>"),
        ("_Z5mixed", "_Z5mixed"),
    ],
)
def test_short_names(signature: str, name: str) -> None:
    assert short_name(signature) == name


def test_names_without_a_demangler_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert kernel_names(["_Z1fv"]) == ["_Z1fv"]


# ---- the command line ------------------------------------------------------------------------------------------------

MODULE = """
import os
import triton
import triton.language as tl
from pearl_kernels.triton.variants import Variant

CRASH = {crash!r}
if CRASH and os.environ.get("TRITON_INTERPRET") != "1":
    os._exit(7)

@triton.jit
def quotient_kernel(x, out, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    value = tl.load(x + columns)
    tl.store(out + columns, value / tl.sum(value))

@triton.jit
def broken_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.load(x) + no_such_name)

def variant(name, kernel, block, spills=None):
    types = {{"x": "*fp32", "out": "*fp32", "BLOCK": "constexpr"}}
    return Variant(name, kernel, types, {{"BLOCK": block}}, num_warps=32, spills=spills)

VARIANTS = (
    variant("small", quotient_kernel, 1024),
    variant("spilling", quotient_kernel, 131072),
    variant("explained", quotient_kernel, 131072, "a row has to stay\\nin [registers]"),
    variant("broken", broken_kernel, 1024),
)
"""

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes a module with test kernels the only one of the Triton provider, here and in the compilers' processes."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def write(name: str, crash: bool = False) -> str:
        (tmp_path / f"{name}.py").write_text(MODULE.format(crash=crash))
        monkeypatch.setattr(triton, "MODULES", {"rms_norm": name})
        return name

    return write


def run(*arguments: str) -> Result:
    return CliRunner().invoke(application(), list(arguments), catch_exceptions=False)


def kernels_of(path: Path) -> dict[str, dict[str, Any]]:
    return {kernel["name"]: kernel for kernel in json.loads(path.read_text())["kernels"]}


def test_a_spill_and_a_failed_compile_fail_the_report(install: Install, tmp_path: Path) -> None:
    install("failing")
    out = tmp_path / "report.json"
    result = run("--arch", "90", "--processes", "1", "--csrc", str(tmp_path / "none"), "--json", str(out))
    assert result.exit_code == 1
    found = kernels_of(out)
    assert set(found) == {f"triton/failing/{name}" for name in ("small", "spilling", "explained", "broken")}
    assert found["triton/failing/small"]["problem"] is None
    assert found["triton/failing/small"]["usage"]["threads"] == 1024
    assert found["triton/failing/small"]["usage"]["dynamic_shared"] > 0  # the sum passes through it
    assert "nothing says why" in found["triton/failing/spilling"]["problem"]
    assert found["triton/failing/explained"]["problem"] is None
    assert found["triton/failing/explained"]["usage"]["stack"] > 0
    assert "no_such_name is not defined" in found["triton/failing/broken"]["problem"]
    assert "no_such_name is not defined" in result.output
    assert "4 kernels" in result.output
    assert "1 not compiled, 1 with a problem, 1 with spills that are explained" in result.output
    assert f"{tmp_path / 'none'} is not there" in result.output.replace("\n", "")


def test_an_explained_spill_is_accepted(install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install("wide")
    answer = asdict(Usage(64, stack=8, spilled=24, threads=1024))
    monkeypatch.setattr(TritonProcess, "ask", lambda self, request: dict(answer))
    arguments = ("--arch", "80", "--csrc", str(tmp_path / "none"), "--kernels")
    accepted = run(*arguments, "triton/*/expl*")
    assert accepted.exit_code == 0
    assert "in [registers]" in accepted.output
    refused = run(*arguments, "spilling")
    assert refused.exit_code == 1
    assert "8 bytes of stack, 24 of spills" in refused.output


def test_a_compiler_that_dies_is_told_and_replaced(install: Install) -> None:
    crashing, good = install("crashing", crash=True), install("working")
    with TritonProcess() as compiler:
        died = compiler.ask({"module": crashing, "variant": "broken", "arch": 90})
        answer = compiler.ask({"module": good, "variant": "broken", "arch": 90})
    assert died["error"] == "the compiler's process ended with status 7"
    assert "no_such_name is not defined" in answer["error"]


FAKE_NVCC = """\
#!/bin/sh
for argument in "$@"; do
  [ "$previous" = --keep-dir ] && work="$argument"
  previous="$argument"
  source="$argument"
done
case "$source" in
  *broken.cu) echo "broken.cu(3): error: identifier \\"x\\" is undefined" >&2; exit 2;;
  *empty.cu) printf '' > "$work/empty.ptx"; exit 0;;
esac
cat {ptx} > "$work/$(basename "$source" .cu).ptx"
cat {log} >&2
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of CUDA sources, and an nvcc that answers with LOG and PTX whatever is in them."""
    (tmp_path / "log").write_text(LOG)
    (tmp_path / "ptx").write_text(PTX)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(FAKE_NVCC.format(log=tmp_path / "log", ptx=tmp_path / "ptx"))
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    monkeypatch.setattr(triton, "MODULES", {})
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    for name in ("three", "broken", "empty"):
        (folder / f"{name}.cu").touch()
    return folder.parent


def test_cuda_kernels_are_read_from_nvcc(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    result = run("--arch", "80", "--arch", "90", "--csrc", str(sources), "--json", str(out))
    assert result.exit_code == 1
    found = json.loads(out.read_text())["kernels"]
    assert sorted({kernel["arch"] for kernel in found}) == [80, 90]
    by_name = kernels_of(out)
    assert by_name["cuda/three/plain"]["problem"] is None
    assert "nothing says why" in by_name["cuda/three/shares"]["problem"]
    assert by_name["cuda/three/shares"]["usage"] == asdict(Usage(64, 360, 968, 4096, None, 256))
    assert 'error: identifier "x" is undefined' in by_name["cuda/broken"]["problem"]
    assert "no kernel" in by_name["cuda/empty"]["problem"]
    assert "4096 + ?" in result.output
    assert "<= 32" in result.output


def test_without_nvcc_it_is_said(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDACXX", str(sources / "no-nvcc"))
    result = run("--csrc", str(sources))
    assert result.exit_code == 0
    assert "nvcc is neither on PATH nor in CUDACXX: the CUDA kernels are not compiled." in result.output


def test_without_triton_it_is_said(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert triton_jobs(ARCHITECTURES) == ([], "triton is not installed: its kernels are not compiled.")


def test_providers_are_explained_for_a_device_that_is_not_there(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    arguments = ("--device", "cuda", "--dtype", "float16", "--head-dim", "64", "--no-compile", "--json", str(out))
    result = run(*arguments)
    assert result.exit_code == 0
    assert "operators on cuda, float16, head_dim 64" in result.output
    found = json.loads(out.read_text())
    assert found["kernels"] == []
    situation = Situation("cuda", torch.float16, 64, torch.get_num_threads())
    assert found["providers"] == {"cuda": {op: [asdict(s) for s in explain(op, situation)] for op in OPERATORS}}
    for op in OPERATORS:
        assert op in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--arch", "75"), "75 is not one of (80, 90, 100)"),
        (("--dtype", "int8"), "'int8' is not one of float32, bfloat16, float16"),
        (("--kernels", "softmax"), "'softmax' is in none of"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, ...], words: str, install: Install, tmp_path: Path) -> None:
    install("unasked")
    result = run("--csrc", str(tmp_path / "none"), *arguments)
    assert result.exit_code == 2
    assert words in result.output


@pytest.mark.skipif(shutil.which(os.environ.get("CUDACXX", "nvcc")) is None, reason="needs nvcc")
def test_nvcc_compiles_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "csrc" / "cuda", tmp_path / "report.json"
    folder.mkdir(parents=True)
    (folder / "twice.cu").write_text(
        "namespace pearl::cuda {\n"
        "template <class T> __global__ __launch_bounds__(96) void twice(T* x) {\n"
        "  __shared__ T copy[96];\n"
        "  copy[threadIdx.x] = x[threadIdx.x];\n"
        "  __syncthreads();\n"
        "  x[threadIdx.x] = 2 * copy[95 - threadIdx.x];\n"
        "}\ntemplate __global__ void twice<float>(float*);\n}\n"
    )
    monkeypatch.setattr(triton, "MODULES", {})
    result = run("--arch", "90", "--csrc", str(folder.parent), "--json", str(out))
    assert result.exit_code == 0, result.output
    (kernel,) = json.loads(out.read_text())["kernels"]
    assert kernel["name"] in ("cuda/twice/twice<float>", "cuda/twice/_ZN5pearl4cuda5twiceIfEEvPT_")  # no demangler
    assert kernel["usage"]["static_shared"] == 96 * 4
    assert kernel["usage"]["threads"] == 96


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pearl_kernels.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)


def test_the_smallest_kernel_compiles_through_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    arguments = ("--kernels", "silu_and_mul-bf16", "--arch", "90", "--csrc", str(tmp_path / "none"), "--json", str(out))
    result = report(*arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    (kernel,) = json.loads(out.read_text())["kernels"]
    assert kernel["name"].startswith("triton/activation/silu_and_mul-bf16")
    assert 16 <= kernel["usage"]["registers"] <= 64
    assert kernel["warps"] >= 32


@pytest.mark.slow
def test_every_variant_of_triton_compiles_without_an_unexplained_spill(tmp_path: Path) -> None:
    """Those in bf16, for sm_90; attention for sm_80, which has the least shared memory. To save minutes: ``python -m
    pearl_kernels.report`` compiles all for all.
    """
    out, jobs = tmp_path / "report.json", triton_jobs(ARCHITECTURES)[0]
    for pattern, arch in (("triton/*bf16*", 90), ("triton/attention/*bf16*d128*", 80)):
        result = report(
            "--kernels", pattern, "--arch", str(arch), "--csrc", str(tmp_path / "none"), "--json", str(out)
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        found = [kernel["name"] for kernel in json.loads(out.read_text())["kernels"]]
        assert sorted(found) == sorted(job.name for job in jobs if job.arch == arch and fnmatch(job.name, pattern))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CUDACXX", "nvcc")) is None, reason="needs nvcc")
def test_every_cuda_source_compiles_without_an_unexplained_spill(tmp_path: Path) -> None:
    """For sm_80, which has the fewest resources, as above."""
    out, archs = tmp_path / "report.json", (80,)
    options = [text for arch in archs for text in ("--arch", str(arch))]
    result = report("--kernels", "cuda/*", *options, "--json", str(out))
    assert result.returncode == 0, result.stdout + result.stderr
    names = {(kernel["name"].split("/")[1], kernel["arch"]) for kernel in json.loads(out.read_text())["kernels"]}
    assert names == {(source.stem, arch) for source in SOURCES.glob("cuda/*.cu") for arch in archs}

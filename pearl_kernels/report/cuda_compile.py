"""Compiles the CUDA sources with nvcc, one file for one architecture at a time, as CMakeLists.txt does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pearl_kernels.report.resources import Compiled, add_launch, read_log
from pearl_kernels.report.triton_jobs import TritonProcess

SOURCES = Path(__file__).resolve().parents[2] / "csrc"  # in a checkout; a wheel does not have them


@dataclass(frozen=True)
class CudaJob:
    """One source file for one architecture."""

    name: str
    nvcc: str
    root: Path
    source: Path
    arch: int

    def run(self, _compiler: TritonProcess, /) -> list[Compiled]:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="pearl-report-") as work:
            command = [
                self.nvcc,
                *("-std=c++17", "-O3", "-DNDEBUG", f"-arch=sm_{self.arch}", "-Xptxas", "-v"),
                *("-I", str(self.root), "-I", str(self.root / "include")),
                *("-cubin", "--keep", "--keep-dir", work, "-o", os.path.join(work, "object.cubin"), str(self.source)),
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - begin
            if result.returncode:
                error = (result.stderr + result.stdout).strip() or f"nvcc ended with status {result.returncode}"
                return [Compiled(self.name, self.arch, seconds, error=error)]
            ptx = Path(work, f"{self.source.stem}.ptx").read_text()
        kernels = add_launch(read_log(result.stderr), ptx)
        if not kernels:
            return [Compiled(self.name, self.arch, seconds, error=f"no kernel in what nvcc said:\n{result.stderr}")]
        names = kernel_names(list(kernels))
        return [
            Compiled(f"{self.name}/{name}", self.arch, seconds, usage)
            for name, usage in sorted(zip(names, kernels.values(), strict=True), key=lambda kernel: kernel[0])
        ]


def cuda_jobs(architectures: Sequence[int], root: Path = SOURCES) -> tuple[list[CudaJob], str | None]:
    """Every ``.cu`` file of ``root/cuda``, and the reason if there are none."""
    if not root.is_dir():
        return [], f"{root} is not there, as after an installation from a wheel: the CUDA kernels are not compiled."
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        return [], "nvcc is neither on PATH nor in CUDACXX: the CUDA kernels are not compiled."
    jobs = []
    for source in sorted(root.glob("cuda/*.cu")):
        jobs += [CudaJob(f"cuda/{source.stem}", nvcc, root, source, arch) for arch in architectures]
    return jobs, None


def kernel_names(mangled: Sequence[str]) -> list[str]:
    """Names as in the source, with template arguments, if there is a demangler; else as they are."""
    demangler = shutil.which("cu++filt") or shutil.which("c++filt")
    if demangler is None or not mangled:
        return list(mangled)
    result = subprocess.run([demangler], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return [short_name(line) for line in result.stdout.splitlines()]


def short_name(signature: str) -> str:
    """``void a::(anonymous namespace)::f<a::T, (a::E)1>(T*)`` is ``f<T, (E)1>``."""
    name = re.sub(r"(?:\w+|\(anonymous namespace\))::", "", signature)
    if name.endswith(")"):
        depth = 0
        for at in range(len(name) - 1, -1, -1):
            depth += (name[at] == ")") - (name[at] == "(")
            if depth == 0:
                name = name[:at]
                break
    return name.removeprefix("void ")

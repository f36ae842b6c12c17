"""Builds the native parts with CMake. Everything declarative is in pyproject.toml.

Environment: PEARL_CUDA=auto|1|0 (see CMakeLists.txt), CMAKE_ARGS (passed on), MAX_JOBS (parallel compilers).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

_ROOT = Path(__file__).resolve().parent
_CUDA_CHOICES = ("auto", "1", "0")


class CMakeBuild(build_ext):
    """One CMake project makes every native module; each lands in its folder of the package."""

    def build_extension(self, ext: Extension) -> None:
        if ext.optional:  # made along with the first, where there is a compiler for it
            return
        import pybind11

        cuda = os.environ.get("PEARL_CUDA", "auto")
        if cuda not in _CUDA_CHOICES:
            raise CompileError(f"PEARL_CUDA={cuda!r} is not one of {', '.join(_CUDA_CHOICES)}")
        cmake = shutil.which("cmake")
        if cmake is None:
            raise CompileError("cmake is not installed: pip install 'cmake>=3.25,<5' ninja")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parents[1]  # of pearl_kernels/cpu/_core
        work = Path(self.build_temp).resolve() / "cmake"
        work.mkdir(parents=True, exist_ok=True)
        # An isolated build's Ninja and Python are gone in the next one; a stale cache would still name them.
        (work / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            cmake,
            *("-S", str(_ROOT), "-B", str(work), "-G", "Ninja"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPEARL_OUTPUT_DIR={output}",
            f"-DPEARL_CUDA={cuda}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]
        jobs = ["--parallel", jobs] if (jobs := os.environ.get("MAX_JOBS")) else []
        self._run(configure, "configure")
        self._run([cmake, "--build", str(work), *jobs], "compile")

    @staticmethod
    def _run(command: list[str], what: str) -> None:
        """Run silently; a failure shows the tool's own words, once, at the end of pip's output."""
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if result.returncode:
            raise CompileError(
                f"pearl's native code did not {what}. {' '.join(command)}\n\n{result.stdout.strip()[-8000:]}\n\n"
                "A C++17 compiler (g++ or clang++) is all it needs; PEARL_CUDA=0 leaves the CUDA kernels out."
            )


setup(
    ext_modules=[
        Extension("pearl_kernels.cpu._core", sources=[]),
        Extension("pearl_kernels.cuda._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)

"""What is built and shipped: setup.py's refusals, torch-free native code, and the contents of a wheel and an sdist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pybind11
import pytest
from bench_support import ROOT

Build = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder with a cmake that writes down its arguments, one line a call."""
    folder = tmp_path / "tools"
    folder.mkdir()
    cmake = folder / "cmake"
    cmake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/cmake.log\n')
    cmake.chmod(0o755)
    return folder


@pytest.fixture
def build(tmp_path: Path, tools: Path) -> Build:
    """``setup.py build_ext`` with these variables; of pybind11 it only asks a folder."""
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    (stubs / "pybind11.py").write_text("def get_cmake_dir():\n    return '/pybind11'\n")

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if k not in ("PEARL_CUDA", "CMAKE_ARGS", "MAX_JOBS")}
        environment = clean | {"PYTHONPATH": str(stubs), "PATH": f"{tools}:/usr/bin:/bin"} | variables
        line = [sys.executable, str(ROOT / "setup.py"), "-q", "build_ext", "--build-temp", "temp", "--build-lib", "lib"]
        return subprocess.run(
            line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    return run


def calls(folder: Path) -> list[str]:
    log = folder / "cmake.log"
    return log.read_text().splitlines() if log.exists() else []


def test_an_unknown_choice_of_cuda_is_refused_before_cmake_runs(build: Build, tmp_path: Path) -> None:
    finished = build(PEARL_CUDA="banana")
    assert finished.returncode != 0
    assert "error: PEARL_CUDA='banana' is not one of auto, 1, 0" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert calls(tmp_path) == []


@pytest.mark.parametrize("choice", ["auto", "1", "0", None])
def test_a_known_choice_of_cuda_reaches_cmake(build: Build, tmp_path: Path, choice: str | None) -> None:
    finished = build(**{"PEARL_CUDA": choice} if choice else {}, CMAKE_ARGS="-DA=1 -DB=2", MAX_JOBS="3")
    assert finished.returncode == 0, finished.stderr
    configure, compile_ = calls(tmp_path)
    for argument in (f"-DPEARL_CUDA={choice or 'auto'}", f"-S {ROOT} ", "-Dpybind11_DIR=/pybind11", "-DA=1 -DB=2"):
        assert argument in configure + " "
    output = re.search(r"-DPEARL_OUTPUT_DIR=(\S+)", configure)
    assert output is not None
    assert output[1] == str(tmp_path / "lib" / "pearl_kernels")
    assert compile_.endswith("--parallel 3")


def test_without_cmake_the_build_says_what_to_install(build: Build, tools: Path) -> None:
    (tools / "cmake").unlink()
    finished = build(PATH=str(tools))
    assert finished.returncode != 0
    assert "cmake is not installed: pip install" in finished.stderr


def test_a_failure_shows_the_tool_s_own_words(build: Build, tools: Path) -> None:
    (tools / "cmake").write_text("#!/bin/sh\necho 'no such compiler: c+++'\nexit 1\n")
    finished = build()
    assert finished.returncode != 0
    for part in ("pearl's native code did not configure", "no such compiler: c+++", "PEARL_CUDA=0"):
        assert part in finished.stderr


def configure(work: Path, cuda: str) -> subprocess.CompletedProcess[str]:
    """The real CMake on the real project, as it is where it has found no CUDA compiler."""
    cmake = shutil.which("cmake")
    assert cmake is not None, "cmake is one of the test tools: pip install -e '.[test]'"
    line = [cmake, "-S", str(ROOT), "-B", str(work), f"-DPython_EXECUTABLE={sys.executable}", f"-DPEARL_CUDA={cuda}"]
    line += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DCMAKE_CUDA_COMPILER=NOTFOUND", "-G", "Unix Makefiles"]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=120)


def test_without_a_cuda_compiler_cuda_kernels_that_were_asked_for_are_an_error(tmp_path: Path) -> None:
    finished = configure(tmp_path, "1")
    assert finished.returncode != 0
    words = " ".join(finished.stderr.split())
    assert "PEARL_CUDA=1 asks for the CUDA kernels, but no CUDA compiler was found." in words
    assert "PEARL_CUDA=0" in words


def test_without_a_cuda_compiler_the_rest_is_built(tmp_path: Path) -> None:
    finished = configure(tmp_path, "auto")
    assert finished.returncode == 0, finished.stderr
    assert "No CUDA compiler: the CUDA kernels are left out." in finished.stdout
    targets = re.findall(r"^(_\w+):", (tmp_path / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert "_core" in targets
    assert "_cuda" not in targets


def test_native_code_includes_no_torch_header() -> None:
    included: set[str] = set()
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".inl", ".cpp", ".cu", ".cuh"):
            included |= set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text("utf-8"), re.MULTILINE))
    assert "pearl/params.h" in included, "nothing was searched"
    assert [name for name in included if re.match(r"(torch|ATen|c10|caffe2)\b", name)] == []
    cmake = re.sub(r"#.*", "", (ROOT / "CMakeLists.txt").read_text("utf-8"))
    assert "torch" not in cmake.lower()


@pytest.fixture(scope="module")
def wheel() -> set[str]:
    """Every file that ``build_py`` puts into a wheel, relative to its root; asked in a process of its own."""
    program = """
import os
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration
dist = apply_configuration(Distribution({"script_name": "setup.py"}), "pyproject.toml")
dist.include_package_data = False  # only what is declared; what git knows does not count
command = dist.get_command_obj("build_py")
command.ensure_finalized()
for package, module, path in command.find_all_modules():
    print(os.path.relpath(path))
for package, source, build, files in command.data_files:
    print(*(os.path.relpath(os.path.join(source, file)) for file in files), sep="\\n")
"""
    line = [sys.executable, "-W", "ignore", "-c", program]
    finished = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return set(finished.stdout.split("\n")) - {""}


PACKAGES = ("pearl", "pearl_kernels")
PAIR = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def test_a_wheel_holds_every_module(wheel: set[str]) -> None:
    modules = {str(path.relative_to(ROOT)) for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert "pearl/llm.py" in modules
    assert modules <= wheel
    assert not [name for name in wheel if not name.startswith(("pearl/", "pearl_kernels/"))]


@pytest.mark.parametrize(
    "name",
    [
        "pearl/bench/data/prompts.jsonl",
        *(f"pearl/models/bundled/{role}/{file}" for role in ("target", "draft") for file in PAIR),
        *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "pearl/serving/page").iterdir())),
    ],
)
def test_a_wheel_works_without_a_network(wheel: set[str], name: str) -> None:
    assert name in wheel


@pytest.mark.parametrize(
    "name",
    ["pearl/py.typed", "pearl_kernels/py.typed", "pearl_kernels/cpu/_core.pyi", "pearl_kernels/cuda/_cuda.pyi"],
)
def test_a_wheel_carries_its_types(wheel: set[str], name: str) -> None:
    """Without py.typed (PEP 561), type checkers take every name of the package for Any."""
    assert name in wheel


def test_an_sdist_holds_what_its_build_needs(tmp_path: Path) -> None:
    """``python -m build`` makes the wheel from the sdist."""
    work = tmp_path / "pearl"
    work.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "CMakeLists.txt", "MANIFEST.in", "csrc"):
        if (ROOT / name).exists():
            (work / name).symlink_to(ROOT / name)
    line = [sys.executable, "-W", "ignore", "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(line, cwd=work, capture_output=True, check=True, timeout=60)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert held >= {"setup.py", "pyproject.toml", "CMakeLists.txt", *native}

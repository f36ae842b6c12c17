"""Builds CUDA sources for the CPU, under the shim beside this file, and gives the operators of the result.

Objects are kept in build/emulated, named by a hash of what they were made from: a source is compiled again only when
it, a header that it includes, or the command has changed.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pearl_kernels.checks import Checks
from pearl_kernels.native import NativeLayers, NativeSampling

ROOT = Path(__file__).resolve().parents[2]
SHIM = ROOT / "tests" / "cuda_emu"
CACHE = ROOT / "build" / "emulated"
_INCLUDE_PATH = (ROOT / "csrc", ROOT / "csrc" / "include", SHIM)
_FLAGS = (
    *("-std=c++17", "-g1", "-fPIC", "-x", "c++", "-DPEARL_EMU", "-ffp-contract=off"),
    *("-fvisibility=hidden", "-fno-gnu-unique"),  # two such libraries in one process share nothing
    *("-fdata-sections", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
)
_CHECKED = ("-O2", "-fsanitize=alignment,bounds", "-fno-sanitize-recover=all")
# Volatile accesses are relaxed atomic ones. The process must have loaded ThreadSanitizer before anything else.
_WATCHED = ("-O1", "-fsanitize=thread", "--param=tsan-distinguish-volatile=1")


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the shim's fibers and guarded pages are Linux's")
_CHECKS = Checks("cpu", (torch.float32, torch.bfloat16, torch.float16))


def _poisoned(like: Tensor, size: int) -> Tensor:
    return like.new_full((size,), 0xFF, dtype=torch.uint8)


def toolkit_headers() -> list[str]:
    """Options that find cuda_runtime.h, cuda_bf16.h and cuda_fp16.h: from a toolkit, or from PyPI; [] if nowhere."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        homes.append(str(Path(nvcc).resolve().parents[1]))
    folders = [Path(home) / "include" for home in homes if home]
    folders += [Path(path) / "nvidia" / "cu13" / "include" for path in sys.path]
    for folder in folders:
        if all((folder / name).exists() for name in ("cuda_runtime.h", "cuda_bf16.h", "crt/host_defines.h")):
            return ["-isystem", str(folder), "-isystem", str(folder / "cccl")]
    return []


@functools.cache
def _missing() -> str | None:
    """What the build lacks here, or None."""
    if shutil.which("g++") is None:
        return "the shim needs g++"
    if importlib.util.find_spec("pybind11") is None:
        return "the shim needs pybind11: pip install -e '.[test]'"
    if not toolkit_headers():
        return "the shim needs CUDA's headers: a toolkit, or nvidia-cuda-runtime, -crt and -cccl from PyPI"
    return None


@functools.cache
def library(source: Path, races: bool = False) -> ctypes.CDLL:
    """One source with functions that it exports."""
    return ctypes.CDLL(str(compiled_library(source, races)))


def compiled_library(source: Path, races: bool = False) -> Path:
    """That library's file."""
    return _build(f"{'races_' if races else ''}{source.stem}", [source], races)


@functools.cache
def module(kernels: str, races: bool = False) -> ModuleType:
    """``pearl_kernels.cuda._cuda`` for CPU memory, with the kernels of one source: a test compiles what it needs.
    With ``races`` ThreadSanitizer watches (``races.py``)."""
    path = compiled(kernels, races)
    spec = importlib.util.spec_from_file_location(f"{path.stem}._cuda", path)  # pybind11 caches modules by their name
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def compiled(kernels: str, races: bool = False) -> Path:
    """That module's file."""
    folder = ROOT / "csrc"
    sources = (
        folder / "cuda" / kernels,
        folder / "python" / "cuda_bindings.cpp",
        folder / "python" / "make_params.cpp",
    )
    return _build(f"_{'races' if races else 'cuda'}_{Path(kernels).stem}", sources, races)


SOURCES: Mapping[str, str] = {
    "rms_norm": "norm.cu",
    "add_rms_norm": "norm.cu",
    "silu_and_mul": "activation.cu",
    "gelu_and_mul": "activation.cu",
    "scale_and_cap": "scaling.cu",
    "rope_and_cache": "rope.cu",
    "verify_attention": "attention.cu",
    "copy_blocks": "copy_blocks.cu",
    "verify": "verify.cu",
}


def operator(op: str, races: bool = False, device: int = 0) -> Callable[..., Any]:
    """The CUDA provider's operator on CPU tensors, built when it is first called. Its workspace holds NaN.
    ``device``: the emulated one, of ``devices.h``."""

    def run(*args: Any, **kwargs: Any) -> Any:
        made = NativeSampling if op == "verify" else NativeLayers
        native = made(module(SOURCES[op], races), _CHECKS, lambda _: (device, 0), _poisoned)
        return getattr(native, op)(*args, **kwargs)

    return run


def _build(name: str, sources: Sequence[Path], races: bool = False) -> Path:
    """A shared library of these sources; at most one build at a time."""
    if reason := _missing():
        raise RuntimeError(reason)
    checks = _WATCHED if races else _CHECKED
    command = ["g++", *_FLAGS, *checks, *(f"-I{path}" for path in _INCLUDE_PATH), *toolkit_headers()]
    python = sysconfig.get_path("include")
    folder = importlib.util.find_spec("pybind11")
    assert folder is not None
    assert folder.origin is not None
    command += ["-isystem", python, "-isystem", str(Path(folder.origin).parent / "include")]
    with _locked():
        objects = [_object(command, source, races) for source in sources]
        missing = [(made, source) for made, source in zip(objects, sources, strict=True) if not made.exists()]
        if missing:
            with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
                list(pool.map(lambda pair: _compile(command, *pair), missing))
        script = SHIM / "shared_pages.ld"
        key = hashlib.sha256("".join(path.name for path in objects).encode() + script.read_bytes()).hexdigest()[:16]
        linked = CACHE / f"{name}-{key}.so"
        if not linked.exists():
            _run(["g++", "-shared", f"-Wl,-T,{script}", *checks, *map(str, objects), "-o"], linked)
        for old in CACHE.glob(f"{name}-*.so"):
            if old != linked:
                old.unlink()
    return linked


def _shim_headers(source: Path) -> list[Path]:
    return [SHIM / "cuda_emu.h", *([SHIM / "some_kernels.h"] if source.suffix == ".cpp" else [])]


def _object(command: Sequence[str], source: Path, races: bool) -> Path:
    """Where a source's object is kept."""
    digest = hashlib.sha256(" ".join(command).encode())
    for path in sorted(set().union(*map(included, (source, *_shim_headers(source))))):
        digest.update(path.read_bytes())
    return CACHE / f"{'races_' if races else ''}{source.stem}-{digest.hexdigest()[:16]}.o"


def _compile(command: Sequence[str], made: Path, source: Path) -> None:
    shim = [part for header in _shim_headers(source) for part in ("-include", str(header))]
    _run([*command, *shim, "-c", str(source), "-o"], made)
    for old in CACHE.glob(f"{made.name.rpartition('-')[0]}-*.o"):
        if old != made:
            old.unlink()


def included(source: Path) -> set[Path]:
    """The file and all of ours that it includes."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text("utf-8"), re.MULTILINE):
            waiting += [folder / name for folder in (path.parent, *_INCLUDE_PATH) if (folder / name).exists()][:1]
    return found


def _run(command: Sequence[str], output: Path) -> None:
    """Runs a compiler; the output appears only when it is complete."""
    unfinished = output.with_suffix(f".{os.getpid()}.tmp")
    finished = subprocess.run([*command, str(unfinished)], capture_output=True, text=True, check=False)
    if finished.returncode:
        unfinished.unlink(missing_ok=True)
        raise RuntimeError(f"{' '.join(command)}\n{finished.stderr}")
    unfinished.rename(output)


@contextmanager
def _locked() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield

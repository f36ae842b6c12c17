"""The Triton variants to compile, and the process that compiles them (``triton_compile``) seen from outside."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pearl_kernels import triton
from pearl_kernels.report.resources import Compiled, Usage


class TritonProcess:
    """Compiles one variant at a time; started by the first, and anew after one that it did not survive."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._files = tempfile.TemporaryDirectory(prefix="pearl-report-")

    def __enter__(self) -> TritonProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._files.cleanup()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process is None:
            self._process = self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            result: dict[str, Any] = json.loads(answer)
            return result
        self._process.communicate()
        code, self._process = self._process.returncode, None
        with open(self._words, errors="replace") as words:
            return {"error": f"the compiler's process ended with status {code}\n{words.read()[-2000:]}".strip()}

    @property
    def _words(self) -> str:
        return os.path.join(self._files.name, "stderr")

    def _start(self) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        # What comes from a cache has no log; even two variants of one report may be the same kernel.
        environment |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}
        environment |= {"TRITON_CACHE_DIR": os.path.join(self._files.name, "cache")}
        with open(self._words, "w") as words:
            return subprocess.Popen(
                [sys.executable, "-m", "pearl_kernels.report.triton_compile"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                env=environment,
            )


@dataclass(frozen=True)
class TritonJob:
    """One variant for one architecture."""

    name: str
    module: str
    variant: str
    arch: int
    spills: str | None

    def run(self, compiler: TritonProcess) -> list[Compiled]:
        begin = time.perf_counter()
        answer = compiler.ask({"module": self.module, "variant": self.variant, "arch": self.arch})
        error = answer.pop("error", None)
        usage = None if error else Usage(**answer)
        return [Compiled(self.name, self.arch, time.perf_counter() - begin, usage, error, self.spills)]


def triton_jobs(architectures: Sequence[int]) -> tuple[list[TritonJob], str | None]:
    """Every variant of every Triton module, and the reason if there are none."""
    if importlib.util.find_spec("triton") is None:
        return [], "triton is not installed: its kernels are not compiled."
    jobs = []
    for module in dict.fromkeys(triton.MODULES.values()):
        for variant in importlib.import_module(module).VARIANTS:
            name = f"triton/{module.rpartition('.')[2]}/{variant.name}"
            jobs += [TritonJob(name, module, variant.name, arch, variant.spills) for arch in architectures]
    return jobs, None

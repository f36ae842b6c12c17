"""Looks for races in the CUDA kernels, and for barriers that no case would miss.

    PYTHONPATH=.:tests:tests/ops python -m cuda_emu.races            every case; then without each barrier in turn
    PYTHONPATH=.:tests:tests/ops python -m cuda_emu.races block.cuh  only without those of files so named

Cases run under ThreadSanitizer, which knows what orders two accesses on a GPU (``memory_order.h``): it reports two that
nothing orders, whatever their order was this time. Its library must be loaded first, so that cases run in a process of
their own, and there in forks of it: the first report ends one. A barrier or fence is taken away by its place: threads
still meet there, but it orders nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cuda_emu import build
from cuda_emu.race_cases import CASES

REPORTED = 66  # the sanitizer's exit status
KERNELS = tuple(dict.fromkeys(build.SOURCES.values()))
_FOLDER = build.ROOT / "csrc" / "cuda"
# Calls, not definitions. Votes order memory, too, but are there for their answers.
_ORDERING = re.compile(r"(?<!void )\b(__syncthreads|__syncwarp|__threadfence|named_barrier|async_wait)\s*\(")


@dataclass(frozen=True)
class Job:
    """Cases to run one after another until something is wrong: of each source in turn, or one of them."""

    sources: Sequence[str]
    case: str = ""  # all
    without: str = ""  # FILE:LINE that orders nothing


@dataclass(frozen=True)
class Outcome:
    status: int  # 0, REPORTED, or of a failure
    source: str
    case: str  # the last that began
    text: str  # what it wrote to stderr


def places() -> list[str]:
    """FILE:LINE of everything in the kernels that orders memory."""
    found = []
    for path in sorted((*_FOLDER.glob("*.cuh"), *_FOLDER.glob("*.cu"))):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if _ORDERING.search(line.split("//")[0]):
                found.append(f"{path.name}:{number}")
    return found


def removal(place: str) -> Job:
    """The job that takes the place's barrier away, and is to be reported."""
    file = _FOLDER / place.split(":")[0]
    parts = {source: build.included(_FOLDER / source) for source in KERNELS}
    having = [source for source in KERNELS if file in parts[source]]
    return Job(sorted(having, key=lambda source: len(parts[source])), without=place)


def missing() -> str | None:
    """What a search lacks here, or None."""
    if shutil.which("g++") is None or not Path(_library()).is_absolute():
        return "the search for races needs g++ and its libtsan"
    spread = Path("/proc/sys/vm/mmap_rnd_bits")
    if os.access(spread, os.R_OK) and int(spread.read_text()) > 30:
        return "ThreadSanitizer finds its memory taken: it needs vm.mmap_rnd_bits of at most 30"
    return None


def _library() -> str:
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def search(jobs: Sequence[Job], symbolize: bool = True) -> list[Outcome]:
    """The jobs' outcomes. ``symbolize``: reports name functions and lines, which takes a second."""
    for source in dict.fromkeys(source for job in jobs for source in job.sources):
        if source in KERNELS:
            build.compiled(source, races=True)
        else:
            build.compiled_library(build.SHIM / source, races=True)
    folders = (build.ROOT, build.ROOT / "tests", build.ROOT / "tests" / "ops")
    environment = os.environ | {
        "LD_PRELOAD": _library(),
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "TSAN_OPTIONS": f"halt_on_error=1 exitcode={REPORTED} symbolize={int(symbolize)}",
        "OMP_NUM_THREADS": "1",
    }
    program = [sys.executable, "-m", "cuda_emu.races", "--forks"]
    given = json.dumps([vars(job) for job in jobs])
    finished = subprocess.run(program, env=environment, input=given, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"the search for races ended with status {finished.returncode}")
    return [Outcome(**json.loads(line)) for line in finished.stdout.splitlines()]


def _in_forks(jobs: Sequence[Job]) -> Iterator[Outcome]:
    """The cases' side: this process runs no kernel, because the sanitizer watches no fork of a process with fibers."""
    torch.set_num_threads(1)
    for job in jobs:
        for source in job.sources:
            outcome = _fork(job, source)
            if outcome.status:
                break
        yield outcome


def _fork(job: Job, source: str) -> Outcome:
    calls = CASES[source]
    if len(os.listdir("/proc/self/task")) > 2:  # its own and the sanitizer's
        raise RuntimeError("the sanitizer watches no fork of a process with threads")
    with tempfile.TemporaryFile() as text, tempfile.TemporaryFile() as names:
        child = os.fork()
        if child == 0:
            os.dup2(text.fileno(), 2)
            os.environ["PEARL_EMU_WITHOUT"] = job.without
            status = 1
            try:
                for name in [job.case] if job.case else calls:
                    os.write(names.fileno(), f"{name}\n".encode())
                    torch.manual_seed(5)
                    calls[name]()
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                    sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        text.seek(0)
        names.seek(0)
        case = names.read().decode().splitlines()[-1:]
        written = text.read().decode(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), source, "".join(case), written)


def _main(arguments: Sequence[str]) -> int:
    if arguments == ["--forks"]:
        for outcome in _in_forks([Job(**job) for job in json.load(sys.stdin)]):
            print(json.dumps(vars(outcome)), flush=True)
        return 0
    failures = 0
    if not arguments:
        for outcome in search([Job([source]) for source in KERNELS]):
            failures += outcome.status != 0
            print(f"{outcome.source}: {'no race' if outcome.status == 0 else outcome.text}")
    chosen = [place for place in places() if not arguments or place.split(":")[0] in arguments]
    for place, outcome in zip(chosen, search(list(map(removal, chosen)), symbolize=False), strict=True):
        failures += outcome.status != REPORTED
        words = f"reported by {outcome.source}, {outcome.case}"
        print(f"without {place}: {words if outcome.status == REPORTED else 'NOT REPORTED ' + outcome.text}")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))

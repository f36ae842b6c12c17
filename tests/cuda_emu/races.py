"""Looks for races in the CUDA kernels, and for barriers that no case would miss.

    PYTHONPATH=.:tests:tests/ops python -m cuda_emu.races            every case; then without each barrier in turn
    PYTHONPATH=.:tests:tests/ops python -m cuda_emu.races block.cuh  only without those of files so named

Cases run under ThreadSanitizer, which knows what orders two accesses on a GPU (``memory_order.h``): it reports two that
nothing orders, whatever their order was this time. Its library must be loaded first, so that cases run in a process of
their own, and there in forks of it: the first report ends one. A barrier or fence is taken away by its place: threads still
meet there, but it orders nothing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from cuda_emu import build

REPORTED = 66  # the sanitizer's exit status
_ORDERING = re.compile(
    r"\b(__syncthreads(_count|_and|_or)?|__syncwarp|__threadfence(_block|_system)?|named_barrier|async_wait)\s*\("
)
_FOLDER = build.ROOT / "csrc" / "cuda"


@dataclass(frozen=True)
class Outcome:
    """Of one fork."""

    without: str  # FILE:LINE that ordered nothing; ""
    source: str
    status: int  # 0, REPORTED, or of a failure
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


def sources_of(place: str) -> list[str]:
    """The sources that a place's file is part of, those with the fewest files first."""
    from cuda_emu.race_cases import CASES

    file = _FOLDER / place.split(":")[0]
    parts = {source: build.included(_FOLDER / source) for source in CASES}
    return sorted((source for source in CASES if file in parts[source]), key=lambda source: len(parts[source]))


def search(without: Sequence[str] = (), symbolize: bool = True) -> list[Outcome]:
    """Runs the cases: all of them without nothing, or for each of the given places until one is reported."""
    for source in dict.fromkeys(build.SOURCES.values()):
        build.compiled(source, races=True)
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
    folders = (build.ROOT, build.ROOT / "tests", build.ROOT / "tests" / "ops")
    environment = os.environ | {
        "LD_PRELOAD": found.stdout.strip(),
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "TSAN_OPTIONS": f"halt_on_error=1 exitcode={REPORTED} symbolize={int(symbolize)} report_thread_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    program = [sys.executable, "-m", "cuda_emu.races", "--forks", *without]
    finished = subprocess.run(program, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if finished.returncode:
        raise RuntimeError(f"the search for races ended with status {finished.returncode}")
    return [Outcome(**json.loads(line)) for line in finished.stdout.splitlines()]


def _in_forks(without: Sequence[str]) -> Iterable[Outcome]:
    """The cases' side: this process runs no kernel, because one with fibers cannot fork a watched one."""
    from cuda_emu.race_cases import CASES

    torch.set_num_threads(1)
    if torch.get_num_threads() != 1 or len(os.listdir("/proc/self/task")) > 2:
        raise RuntimeError("the sanitizer watches no fork of a process with threads")
    if not without:
        yield from (_fork(source, "") for source in CASES)
    for place in without:
        for source in sources_of(place):
            outcome = _fork(source, place)
            if outcome.status:
                break
        yield outcome


def _fork(source: str, without: str) -> Outcome:
    from cuda_emu.race_cases import CASES

    build.module(source, races=True)
    with tempfile.TemporaryFile() as text, tempfile.TemporaryFile() as names:
        child = os.fork()
        if child == 0:
            os.dup2(text.fileno(), 2)
            os.environ["PEARL_EMU_WITHOUT"] = without
            status = 1
            try:
                for name, call in CASES[source].items():
                    os.write(names.fileno(), f"{name}\n".encode())
                    torch.manual_seed(5)
                    call()
                status = 0
            finally:
                if status:
                    sys.excepthook(*sys.exc_info())
                    sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        text.seek(0)
        names.seek(0)
        case = names.read().decode().splitlines()[-1:]
        written = text.read().decode(errors="replace")
    return Outcome(without, source, os.waitstatus_to_exitcode(status), "".join(case), written)


def _main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--forks"]:
        for outcome in _in_forks(arguments[1:]):
            print(json.dumps(vars(outcome)), flush=True)
        return 0
    failures = 0
    if not arguments:
        for outcome in search():
            failures += outcome.status != 0
            print(f"{outcome.source}: {'no race' if outcome.status == 0 else outcome.text}")
    for outcome in search([place for place in places() if not arguments or place.split(":")[0] in arguments], False):
        missed = outcome.status != REPORTED
        failures += missed
        words = "NOT REPORTED" if missed else f"reported by {outcome.source}, {outcome.case}"
        print(f"without {outcome.without}: {words}")
        if missed and outcome.status:
            print(outcome.text)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))

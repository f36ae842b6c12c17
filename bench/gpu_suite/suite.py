"""The stages one after another within a budget of wall time; results are written after every one."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from bench.gpu_suite.environment import commit, gpus
from bench.gpu_suite.process import Ended, run_limited
from bench.gpu_suite.report import CUT_OFF, FAILED, OK, SKIPPED, Outcome, Summary, write
from bench.gpu_suite.results import complaint, sees_cuda
from bench.gpu_suite.stages import DRY, Command, Place, Stage, has_module, stages

BUDGET, DRY_BUDGET = 525.0, 240.0  # seconds; a GPU machine is asked for less than 9 minutes
LEAST_BUDGET = 5.0
RESERVE = 20.0  # of the budget: for the pictures
PICTURES = ("round.png", "kernels.png")


@dataclass(frozen=True)
class Budget:
    """Wall time, from the start of the suite on."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    begin: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "begin", self.clock())

    @property
    def spent(self) -> float:
        return self.clock() - self.begin

    @property
    def left(self) -> float:
        """What is left for stages: the reserve is not."""
        return self.seconds - min(RESERVE, self.seconds / 5) - self.spent

    def limit(self, stage: Stage, later: Sequence[Stage]) -> float:
        """The stage's own limit, more if the stages before it left some of theirs, less if the budget ends."""
        unspent = self.left - stage.limit - sum(other.limit for other in later)
        return min(self.left, stage.limit + max(0.0, unspent))


@dataclass
class Stop:
    """The signal that asked the suite to end, if one did."""

    number: int = 0

    def __call__(self) -> bool:
        return self.number != 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """The handler only notes the signal: what runs sees it between two polls, and nothing is left half done."""

        def note(number: int, frame: FrameType | None) -> None:
            self.number = number

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_stage(stage: Stage, limit: float, place: Place, stop: Stop) -> Outcome:
    """Its commands one after another, each within its share of what is left; one that fails does not stop the next."""
    begin, done, instead = time.monotonic(), list[tuple[Command, Ended]](), ""
    environment = {**os.environ, **stage.environment, "PYTHONPATH": str(place.root), "PYTHONUNBUFFERED": "1"}
    for name in stage.files:
        place.file(name).unlink(missing_ok=True)  # of an earlier run
    log = _log(place, stage)
    log.write_text(f"{DRY}\n" if place.dry else "")
    for command in stage.commands:
        left = limit - (time.monotonic() - begin)
        if stop() or left < 1 or (command.instead and done[-1][1].ok):
            break
        if command.instead:
            failed, _ = done.pop()
            instead = f"{failed.name} could not (see the log): {command.name}"
        share, where = command.share * left, place.root
        done.append((command, run_limited(command.argv, log, share, cwd=where, environment=environment, stopped=stop)))
    return _outcome(stage, done, time.monotonic() - begin, place, instead)


def _log(place: Place, stage: Stage) -> Path:
    return place.out / "logs" / f"{stage.name}.log"


def _outcome(
    stage: Stage, done: Sequence[tuple[Command, Ended]], seconds: float, place: Place, instead: str
) -> Outcome:
    expected = sum(not command.instead for command in stage.commands)
    reasons = [instead] if instead else []
    reasons += [f"{command.name} was cut off by {ended.cut_off}" for command, ended in done if ended.cut_off]
    failures = [(command, ended) for command, ended in done if not (ended.ok or ended.cut_off)]
    reasons += [f"{command.name} ended with status {ended.code}" for command, ended in failures]
    if failures:
        reasons.append(f"the log ends with: {_last_line(_log(place, stage))}")
    if len(done) < expected:
        reasons.append(f"{expected - len(done)} of {expected} commands did not begin")
    cut_off = len(done) < expected or any(ended.cut_off for _, ended in done)
    status = FAILED if failures else CUT_OFF if cut_off else OK
    if status == OK and (wrong := complaint(stage, place)):
        status, reasons = FAILED, [*reasons, wrong]
    return Outcome(stage.name, status, seconds, "; ".join(reasons), tuple(ended for _, ended in done))


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def why_not(stage: Stage, limit: float, place: Place, stop: Stop) -> str:
    """The reason to skip a stage; empty if there is none."""
    if stop():
        return "the suite was interrupted"
    if limit < stage.least:
        return f"{max(0.0, limit):.0f} s of the budget are left, it needs {stage.least:.0f}"
    if missing := [name for name in stage.needs if not has_module(name)]:
        return f"{', '.join(missing)} cannot be imported by {sys.executable}"
    if absent := [name for name in stage.scripts if not (place.root / name).exists()]:
        return f"{', '.join(absent)} is not in this checkout"
    if stage.on_gpu and not place.dry and sees_cuda(place) is False:
        return "torch sees no CUDA device; --dry-run tries the suite on the CPU"
    return ""


def run(names: Sequence[str], place: Place, budget: Budget) -> int:
    """The exit status."""
    place.out.joinpath("logs").mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        (place.out / picture).unlink(missing_ok=True)
    found = gpus()
    every = stages(place, found[0].get("compute_cap", "") if found else "")
    chosen = [stage for stage in every if stage.name in names or (stage.name == "build" and not place.built)]
    summary, stop = Summary(place, names=tuple(stage.name for stage in chosen), commit=commit(place.root)), Stop()
    with stop.listening():
        for index, stage in enumerate(chosen):
            limit = budget.limit(stage, chosen[index + 1 :])
            say(budget, f"{stage.name}: up to {max(0.0, limit):.0f} s")
            if stage.name == "build" and place.built and place.dry:
                outcome = Outcome(stage.name, OK, 0.0, "is built already")
            elif reason := why_not(stage, limit, place, stop):
                outcome = Outcome(stage.name, SKIPPED, 0.0, reason)
            else:
                outcome = run_stage(stage, limit, place, stop)
            say(budget, f"{stage.name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.reason}")
            summary.add(outcome, budget.spent)
            write(summary)
        if not stop():
            draw(summary, budget, stop)
        write(summary)
    say(budget, f"written to {place.out}: summary.md, summary.json")
    return 128 + stop.number if stop() else int(not summary.ok)


def draw(summary: Summary, budget: Budget, stop: Stop) -> None:
    """In a process of its own, under a limit: matplotlib may be missing, and its first import looks for fonts."""
    place = summary.place
    argv = (sys.executable, "-m", "bench.gpu_suite.pictures", str(place.out), *PICTURES)
    limit = max(2.0, budget.seconds - budget.spent - 2)
    log = place.out / "logs" / "pictures.log"
    log.write_text(f"{DRY}\n" if place.dry else "")
    ended = run_limited(argv, log, limit, cwd=place.root, environment=os.environ, stopped=stop)
    if not ended.ok:
        summary.notes.append(f"no pictures: {ended.cut_off or _last_line(log)}")


def say(budget: Budget, text: str) -> None:
    print(f"[{budget.spent:5.0f} s] {text}", flush=True)


def options(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "bench/gpu_suite.sh", description="Build, test and measure on a GPU. Results go to $OUT (bench/results/).",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="the same stages on the CPU, with tiny shapes")
    parser.add_argument("--stages", default=",".join(names), help="which, separated by commas; default: %(default)s")
    parser.add_argument(
        "--budget", type=float, help=f"seconds of wall time; default: {BUDGET:.0f}, dry: {DRY_BUDGET:.0f}"
    )
    chosen = parser.parse_args(arguments)
    chosen.stages = [name.strip() for name in chosen.stages.split(",") if name.strip()]
    if unknown := [name for name in chosen.stages if name not in names]:
        parser.error(f"--stages: {unknown[0]!r} is not one of {', '.join(names)}")
    if not chosen.stages:
        parser.error(f"--stages names none; there are {', '.join(names)}")
    if chosen.budget is not None and not LEAST_BUDGET <= chosen.budget < float("inf"):
        parser.error(f"--budget must be at least {LEAST_BUDGET:g} seconds, not {chosen.budget:g}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    root = Path(__file__).resolve().parents[2]
    chosen = options(arguments, [stage.name for stage in stages(Place(root, root))])
    default = root / "bench" / "results"
    out = Path(os.environ.get("OUT") or (default / "dry-run" if chosen.dry_run else default))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu_suite.sh: error: OUT: {error}", file=sys.stderr)
        return 2
    budget = Budget(chosen.budget or (DRY_BUDGET if chosen.dry_run else BUDGET))
    return run(chosen.stages, Place(root, out.resolve(), chosen.dry_run), budget)

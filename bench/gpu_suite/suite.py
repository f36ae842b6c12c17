"""The stages one after another within a budget of wall time; results are written after every one.

A second command can do what a first one had no time for: what was built, measured and found out stays in a work folder.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType

from bench.gpu_suite.environment import commit, gpus
from bench.gpu_suite.outcome import CUT_OFF, FAILED, OK, SKIPPED, Outcome, keep, kept
from bench.gpu_suite.process import Ended, run_limited
from bench.gpu_suite.report import Summary, write
from bench.gpu_suite.results import complaint, sees_cuda
from bench.gpu_suite.stages import DRY, Command, Place, Stage, has_module, stages

BUDGET, DRY_BUDGET = 570.0, 240.0  # seconds; a command on a GPU machine gets 10 minutes at most
LEAST_BUDGET = 5.0
RESERVE = 20.0  # of the budget: for summary, archive, pictures, and a command that does not die at once
PICTURES = ("round.png", "kernels.png")
_LEAST_DRAWING = 2.0


@dataclass(frozen=True)
class Budget:
    """Wall time, from the start of the suite on."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    begin: float = field(default_factory=time.monotonic)

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

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_stage(stage: Stage, limit: float, place: Place, stop: Stop) -> Outcome:
    """Its commands one after another, each within its share of what is left; one that fails does not stop the next."""
    begin, done = time.monotonic(), list[tuple[Command, Ended]]()
    path = os.pathsep.join(filter(None, (str(place.root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **stage.environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    for name in stage.files:
        place.file(name).unlink(missing_ok=True)  # of an earlier run
    log = place.log(stage.name)
    log.write_text(f"{DRY}\n" if place.dry else "")
    for command in stage.commands:
        left = limit - (time.monotonic() - begin)
        if stop() or left < 1:
            break
        share, where = command.share * left, place.root
        done.append((command, run_limited(command.argv, log, share, cwd=where, environment=environment, stopped=stop)))
    return _outcome(stage, done, time.monotonic() - begin, place)


def _outcome(stage: Stage, done: Sequence[tuple[Command, Ended]], seconds: float, place: Place) -> Outcome:
    expected = len(stage.commands)
    reasons = [f"{command.name} was cut off by {ended.cut_off}" for command, ended in done if ended.cut_off]
    failures = [(command, ended) for command, ended in done if not (ended.ok or ended.cut_off)]
    reasons += [f"{command.name} ended with status {ended.code}" for command, ended in failures]
    if failures:
        reasons.append(f"the log ends with: {_last_line(place.log(stage.name))}")
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


def run(names: Sequence[str], place: Place, budget: Budget, goes_on: bool = False) -> int:
    """The exit status. ``goes_on``: with what earlier commands left in the work folder."""
    with (stop := Stop()).listening():
        summary = _begin(names, place, goes_on)
        every = {stage.name: stage for stage in _stages_here(place)}
        chosen = [every[name] for name in summary.names]
        for index, stage in enumerate(chosen):
            _take_turn(stage, chosen[index + 1 :], summary, budget, stop)
        write(summary)  # before anything else can go wrong
        if not stop():
            draw(summary, budget, stop)
            write(summary)
    say(budget, f"written to {place.out}: {', '.join(sorted(p.name for p in place.out.iterdir() if p.is_file()))}")
    if rest := [outcome.name for outcome in summary.all if outcome.status in (SKIPPED, CUT_OFF)]:
        say(budget, f"for the rest, here: bash bench/gpu_suite.sh --only {','.join(rest)}")
    return 128 + stop.number if stop() else int(not summary.ok)


def _stages_here(place: Place) -> Sequence[Stage]:
    found = gpus()
    return stages(place, found[0].get("compute_cap", "") if found else "")


def _begin(names: Sequence[str], place: Place, goes_on: bool) -> Summary:
    """Clears what earlier commands left, or takes it over. What was not asked for is built if it has to be."""
    if not goes_on:
        shutil.rmtree(place.results, ignore_errors=True)
    place.log("").parent.mkdir(parents=True, exist_ok=True)
    for picture in PICTURES:
        (place.out / picture).unlink(missing_ok=True)
    every = [stage.name for stage in stages(place)]
    chosen = tuple(name for name in every if name in names or (name == "build" and not place.built))
    earlier = tuple(outcome for outcome in kept(_outcomes(place)) if outcome.name not in chosen)
    return Summary(place, chosen, commit(place.root), earlier=earlier)


def _outcomes(place: Place) -> Path:
    return place.results / "outcomes.json"


def _take_turn(stage: Stage, later: Sequence[Stage], summary: Summary, budget: Budget, stop: Stop) -> None:
    """Run or skip a stage, and note what became of it."""
    place, limit = summary.place, budget.limit(stage, later)
    say(budget, f"{stage.name}: up to {max(0.0, limit):.0f} s")
    if stage.name == "build" and place.built:
        outcome = Outcome(stage.name, OK, 0.0, "is built already")
    elif reason := why_not(stage, limit, place, stop):
        outcome = Outcome(stage.name, SKIPPED, 0.0, reason)
    else:
        outcome = run_stage(stage, limit, place, stop)
        if stage.name == "build" and outcome.status == OK:
            outcome = _checked_build(outcome, place)
    say(budget, f"{stage.name}: {outcome.status} after {outcome.seconds:.0f} s {outcome.reason}")
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    summary.add(replace(outcome, date=date, commit=summary.commit), budget.spent)
    keep(_outcomes(place), summary.all)
    if not stop():  # the rest is skipped at once, and written at once
        write(summary)


def _checked_build(outcome: Outcome, place: Place) -> Outcome:
    """CMake leaves the CUDA kernels out where it finds no compiler for them, which is no success here."""
    place.note_built()
    return outcome if place.built else replace(outcome, status=FAILED, reason="not all modules were built: see the log")


def draw(summary: Summary, budget: Budget, stop: Stop) -> None:
    """In a process of its own, under a limit: matplotlib may be missing, and its first import looks for fonts."""
    place = summary.place
    argv = (sys.executable, "-m", "bench.gpu_suite.pictures", str(place.out), *PICTURES)
    if (limit := budget.seconds - budget.spent - _LEAST_DRAWING) < _LEAST_DRAWING:
        summary.notes.append("no pictures: no time was left")
        return
    log = place.log("pictures")
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
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--only", metavar="STAGES", help=f"which, separated by commas, of: {', '.join(names)}")
    some.add_argument("--from", dest="first", metavar="STAGE", help="this stage and those after it")
    parser.add_argument(
        "--budget", type=float, help=f"seconds of wall time in all; default: {BUDGET:.0f}, dry: {DRY_BUDGET:.0f}"
    )
    parser.add_argument(
        "--work", type=Path, help="folder of what is built and measured, which --only and --from go on with; "
        "default: build/gpu_suite",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    asked = names if chosen.only is None else [name.strip() for name in chosen.only.split(",") if name.strip()]
    option, named = ("--only", asked) if chosen.first is None else ("--from", [chosen.first])
    if unknown := [name for name in named if name not in names]:
        parser.error(f"{option}: {unknown[0]!r} is not one of {', '.join(names)}")
    if not asked:
        parser.error(f"--only names none; there are {', '.join(names)}")
    chosen.stages = asked if chosen.first is None else names[names.index(chosen.first) :]
    if chosen.budget is not None and not LEAST_BUDGET <= chosen.budget < float("inf"):
        parser.error(f"--budget must be at least {LEAST_BUDGET:g} seconds, not {chosen.budget:g}")
    return chosen


def main(arguments: Sequence[str] | None = None) -> int:
    begin = time.monotonic()
    root = Path(__file__).resolve().parents[2]
    chosen = options(arguments, [stage.name for stage in stages(Place(root, root, root))])
    default = root / "bench" / "results"
    out = Path(os.environ.get("OUT") or (default / "dry-run" if chosen.dry_run else default))
    work = chosen.work or root / "build" / ("gpu_suite_dry" if chosen.dry_run else "gpu_suite")
    for name, folder in (("OUT", out), ("--work", work)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            print(f"gpu_suite.sh: error: {name}: {error}", file=sys.stderr)
            return 2
    place = Place(root, out.resolve(), work.resolve(), chosen.dry_run)
    budget = Budget(chosen.budget or (DRY_BUDGET if chosen.dry_run else BUDGET), begin=begin)
    return run(chosen.stages, place, budget, goes_on=bool(chosen.only or chosen.first))

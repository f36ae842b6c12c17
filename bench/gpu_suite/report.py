"""What the GPU suite found out, as summary.json for programs and summary.md for people. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from bench.gpu_suite.archive import ARCHIVE, pack
from bench.gpu_suite.files import replace_text
from bench.gpu_suite.latency import latency_sections
from bench.gpu_suite.markdown import number, share, table
from bench.gpu_suite.outcome import OK, SKIPPED, Outcome
from bench.gpu_suite.results import AIM, MALFORMED, UNREADABLE, numbers
from bench.gpu_suite.stages import DRY, Place

Section = Callable[[Mapping[str, Any]], list[str]]  # the numbers of a stage to paragraphs of markdown


@dataclass
class Summary:
    """What is known so far; a suite that was cut off has a part of it.

    ``names``: the stages that this command was asked for. ``earlier``: those that a command before it has run in the
    same work folder, whose results lie there still.
    """

    place: Place
    names: tuple[str, ...]
    commit: str | None
    outcomes: list[Outcome] = field(default_factory=list)
    earlier: tuple[Outcome, ...] = ()
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, outcome: Outcome, spent: float) -> None:
        self.outcomes.append(outcome)
        self.seconds = spent

    @property
    def ok(self) -> bool:
        """Whether all that this command was asked for is."""
        return len(self.outcomes) == len(self.names) and all(o.status == OK for o in self.outcomes)

    @property
    def all(self) -> list[Outcome]:
        return [*self.earlier, *self.outcomes]

    @property
    def numbers(self) -> dict[str, dict[str, Any]]:
        """Of the stages that were begun; what lies in the work folder of others does not count."""
        return {o.name: numbers(o.name, self.place) for o in self.all if o.status != SKIPPED}


def write(summary: Summary) -> None:
    """summary.json, summary.md and the archive: whatever ends the suite leaves the latest whole ones."""
    found = summary.numbers
    stages = [{**asdict(o), "numbers": found.get(o.name, {})} for o in summary.all]
    content = {
        "title": _title(summary),
        "dry_run": summary.place.dry,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": summary.commit,
        "seconds": summary.seconds,
        "ok": summary.ok,
        "not_reached": list(summary.names[len(summary.outcomes) :]),
        "notes": summary.notes,
        "stages": stages,
    }
    replace_text(summary.place.out / "summary.json", json.dumps(content, indent=2) + "\n")
    if left_out := pack(summary.place.results, summary.place.out / ARCHIVE):
        found["archive"] = {"left_out": left_out}
    replace_text(summary.place.out / "summary.md", markdown(summary, found, content["date"]))


def _title(summary: Summary) -> str:
    return f"{DRY}: GPU suite on the CPU, tiny shapes" if summary.place.dry else "GPU suite"


def markdown(summary: Summary, found: Mapping[str, Mapping[str, Any]], date: Any) -> str:
    parts = [f"# {_title(summary)}", f"Commit {summary.commit or 'unknown'}, {date}, {summary.seconds:.0f} s."]
    if summary.place.dry:
        parts.append(f"**{DRY}**: nothing here is a measurement of a GPU, and no number means anything.")
    rows = [(o.name, o.status, f"{o.seconds:.0f}", _when(o), o.reason) for o in summary.earlier]
    rows += [(o.name, o.status, f"{o.seconds:.0f}", "", o.reason) for o in summary.outcomes]
    rows += [(name, "not reached", "", "", "") for name in summary.names[len(summary.outcomes) :]]
    parts.append(table(("stage", "status", "s", "by an earlier command", "why"), rows, left=(0, 1, 3, 4)))
    parts += summary.notes
    if "archive" in found:
        parts.append(f"Too large for {ARCHIVE}, left out: {', '.join(found['archive']['left_out'])}.")
    sections: dict[str, Section] = {
        "environment": _environment, "smoke": _tests, "latency": latency_sections, "agreement": _greedy,
        "kernels": _kernels, "tests": _tests, "latency_32b": latency_sections, "more": _more,
    }  # fmt: skip
    for name, section in sections.items():
        if found.get(name):
            parts += [f"## {name.replace('_', ' ').capitalize()}", *_readable(section, found[name])]
    for picture in ("round.png", "kernels.png"):
        if (summary.place.out / picture).exists():
            parts.append(f"![{picture}]({picture})")
    return "\n\n".join(parts) + "\n"


def _when(outcome: Outcome) -> str:
    return f"{outcome.date}, commit {outcome.commit or 'unknown'}"


def _readable(section: Section, found: Mapping[str, Any]) -> list[str]:
    try:
        return [f"Not as expected: {found[UNREADABLE]}"] if UNREADABLE in found else section(found)
    except MALFORMED as error:
        return [f"Not as expected: {error!r}"]


def _environment(found: Mapping[str, Any]) -> list[str]:
    packages = found.get("packages", {})
    rows = [(f"GPU {i}: {key}", value) for i, gpu in enumerate(found.get("gpus", [])) for key, value in gpu.items()]
    rows += [(key, str(found.get(key))) for key in ("python", "nvcc", "system")]
    rows += [(name, version) for name, version in packages.items() if version]
    torch = found.get("torch")
    rows += [(f"torch: {key}", str(value)) for key, value in (torch or {"works": False}).items()]
    parts = [table(("what", "value"), rows, left=(0, 1))]
    if absent := [name for name, version in packages.items() if not version]:
        parts.append(f"Not installed: {', '.join(absent)}.")
    for device, chosen in found.get("providers", {}).items():
        runs = ", ".join(f"{op}: {provider or 'none'}" for op, provider in chosen.items())
        parts.append(f"Chosen on {device}: {runs}.")
    return parts


def _tests(found: Mapping[str, Any]) -> list[str]:
    parts = [f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped."]
    for failure in found["first_failures"]:
        parts.append(f"`{failure['test']}`\n\n```\n{failure['text']}\n```")
    return parts


def _kernels(found: Mapping[str, Any]) -> list[str]:
    parts = [f"{found['device']}; share of {number(found['limit_gb_s'])} GB/s, the read bandwidth measured beside."]
    if found["aims"]:
        parts[0] += (
            f" The aim is {share(AIM)} for attention over 8k keys and more, and for sample and verify on vocabularies "
            f"of 128k: {found['reached']} of {found['aims']} shapes reach it."
        )
    rows = [
        (
            k["op"], k["shape"], k["dtype"], k["provider"], number(k["seconds"] * 1e6), number(k["gb_s"]),
            share(k["share"]), "" if k["aim"] is None else "reached" if k["reached"] else "MISSED",
            f"{k['over_rival']:.2f}x" if k["over_rival"] else "",
            ", ".join(f"{name} {share(value)}" for name, value in k["providers"].items()),
        )
        for k in found["shapes"]
    ]  # fmt: skip
    head = ("operator", "shape", "dtype", "fastest", "us", "GB/s", "of limit", "aim", "over rival", "all providers")
    return [*parts, table(head, rows, left=(0, 1, 2, 3, 7, 9))]


def _more(found: Mapping[str, Any]) -> list[str]:
    parts = []
    if "throughput" in found:
        settings, results = found["throughput"]["settings"], found["throughput"]["results"]
        title = f"The bundled pair on {settings['device']}, {settings['prompts']} prompts, measured acceptance:"
        rows = [
            (r["method"], number(r["tok_s"]), f"{r['speedup']:.2f}x", f"{r['acceptance_rate']:.2f}",
             f"{r['window']:g}", f"{r['efficiency']:.2f}")
            for r in results
        ]  # fmt: skip
        parts += [title, table(("method", "tok/s", "speedup", "acceptance", "window", "efficiency"), rows, left=(0,))]
        if not found["throughput"]["complete"]:
            parts.append("Cut off: medians of the runs that ended.")
    return [*parts, *_kernels(found["kernels"])] if "kernels" in found else parts


def _greedy(found: Mapping[str, Any]) -> list[str]:
    comparisons: Sequence[Mapping[str, Any]] = found["comparisons"]
    verdict = "every difference is a tie" if found["agrees"] else "SOME DIFFERENCES ARE NO TIES"
    ties = ", ".join(f"{dtype} {value:g}" for dtype, value in found["ties"].items())
    part = "" if found["complete"] else " Not all was compared."
    rows = [
        (
            c["run"], c["expected"], f"{c['prompts'] - len(c['differences'])} of {c['prompts']}",
            sum(d["tie"] for d in c["differences"]), sum(not d["tie"] for d in c["differences"]), f"{c['drift']:.2g}",
        )
        for c in comparisons
    ]  # fmt: skip
    head = ("greedy outputs of", "against", "equal", "ties", "no ties", "drift")
    parts = [
        f"Greedy outputs: {verdict} (two tokens whose log-probabilities differ by at most: {ties}).{part}",
        table(head, rows, left=(0, 1)),
    ]
    differences = [
        (c["run"], d["prompt"], d["position"], d["expected_token"], d["token"], _gap(d["expected_gap"]), _gap(d["gap"]),
         "tie" if d["tie"] else "NO TIE")
        for c in comparisons
        for d in c["differences"]
    ]  # fmt: skip
    if differences:
        heads = ("outputs of", "prompt", "token", "expected", "got", "gap there", "gap here", "verdict")
        parts.append(table(heads, differences, left=(0, 7)))
    return parts


def _gap(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"

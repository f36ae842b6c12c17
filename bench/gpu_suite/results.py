"""Reads what the stages of the GPU suite wrote, whole or not: the numbers for a summary. Standard library only."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu_suite.latency import measured
from bench.gpu_suite.stages import Place, Stage

AIM = 0.8  # share of the measured bandwidth
_AIMED = {"verify_attention": (r"(\d+) keys", 8192), "sample": (r"x(\d+)", 128_000), "verify": (r"x(\d{4,})", 128_000)}
_FAILURES = 5  # whose text is kept
_FAILURE_CHARACTERS = 1500


UNREADABLE = "unreadable"  # the key of what is wrong with results
# What reading raises where a file of another program is not as expected: that must not cost the other stages' results.
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def read_json(path: Path) -> Any:
    """None if it is not there, or was cut off while it was written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def sees_cuda(place: Place) -> bool | None:
    """As the environment stage found out; None if it did not."""
    found = read_json(place.file("environment.json"))
    if not isinstance(found, dict):
        return None
    return bool(found["torch"] and found["torch"]["cuda_available"])


def numbers(stage: str, place: Place) -> dict[str, Any]:
    """The key numbers of a stage; empty where it wrote none."""
    readers = {
        "environment": _environment, "smoke": _smoke, "latency": _latency_8b, "agreement": _agreement,
        "kernels": _kernels_with_aims, "tests": _tests, "latency_32b": _latency_32b, "more": _more,
    }  # fmt: skip
    try:
        return readers[stage](place) if stage in readers else {}
    except MALFORMED as error:
        return {UNREADABLE: repr(error)}


def complaint(stage: Stage, place: Place) -> str:
    """What is wrong with the results of commands that all succeeded; empty if nothing is."""
    found = numbers(stage.name, place)
    if stage.files and not found:
        return "it wrote no results"
    if UNREADABLE in found:
        return f"its results are not as expected: {found[UNREADABLE]}"
    if "measured" in found and not found["measured"]:
        reasons = [cell["skipped"] for content in found["files"].values() for cell in content["cells"]]
        return f"no cell could be measured: {reasons[0] if reasons else 'there is none'}"
    return ""


def _environment(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = read_json(place.file("environment.json")) or {}
    providers = (read_json(place.file("providers.json")) or {}).get("providers", {})
    chosen = {
        device: {op: next((line["provider"] for line in lines if line["chosen"]), None) for op, lines in ops.items()}
        for device, ops in providers.items()
    }
    return {**found, "providers": chosen} if chosen else found


@dataclass(frozen=True)
class Failure:
    test: str
    text: str


def _smoke(place: Place) -> dict[str, Any]:
    return _junit(place, "smoke.xml")


def _tests(place: Place) -> dict[str, Any]:
    return _junit(place, "tests.xml", "tests-alone.xml", "tests-triton.xml")


def _junit(place: Place, *names: str) -> dict[str, Any]:
    """Of all these files together."""
    cases = [case for name in names for case in _cases(place.file(name))]
    if not cases:
        return {}
    failures = [failure for case in cases if (failure := _failure(case))]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(failures) - skipped,
        "failed": len(failures),
        "skipped": skipped,
        "first_failures": [asdict(failure) for failure in failures[:_FAILURES]],
    }


def _cases(path: Path) -> Sequence[ElementTree.Element]:
    try:
        return list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return ()


def _failure(case: ElementTree.Element) -> Failure | None:
    """The end of its text, which says what was wrong."""
    for kind in ("failure", "error"):
        if (found := case.find(kind)) is not None:
            text = (found.text or found.get("message") or "").strip()
            return Failure(f"{case.get('classname')}::{case.get('name')}", text[-_FAILURE_CHARACTERS:])
    return None


@dataclass(frozen=True)
class Kernel:
    """The best provider of an operator on a shape; ``aim`` is None where there is none."""

    op: str
    shape: str
    dtype: str
    provider: str
    seconds: float
    gb_s: float
    limit_gb_s: float
    share: float
    over_rival: float | None  # how many times faster than the fastest of what a user would call instead
    providers: Mapping[str, float]  # each one's share
    aim: float | None

    @property
    def reached(self) -> bool:
        return self.aim is None or self.share >= self.aim


def _kernels_with_aims(place: Place) -> dict[str, Any]:
    return _kernels(place, "kernels-aims.json")


def _kernels(place: Place, name: str) -> dict[str, Any]:
    rows = [
        benchmark["extra_info"]
        for benchmark in (read_json(place.file(name)) or {}).get("benchmarks", [])
        if "gb_s" in benchmark["extra_info"]
    ]
    found = best_kernels(rows)
    aimed = [kernel for kernel in found if kernel.aim is not None]
    if not rows:
        return {}
    return {
        "device": rows[0]["device"],
        "limit_gb_s": found[0].limit_gb_s if found else None,
        "aims": len(aimed),
        "reached": sum(kernel.reached for kernel in aimed),
        "shapes": [{**asdict(kernel), "reached": kernel.reached} for kernel in found],
    }


def best_kernels(rows: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """Of the measured rows, one for each operator, shape and dtype that one of our kernels computed."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"], row["dtype"]), []).append(row)
    found = []
    for (op, shape, dtype), group in groups.items():
        ours = [r for r in group if r["role"] == "provider" and r["contender"] != "reference"]
        if not ours:
            continue
        best = min(ours, key=lambda r: float(r["seconds"]))
        rivals = [float(r["seconds"]) for r in group if r["role"] == "rival"]
        found.append(
            Kernel(
                op, shape, dtype.removeprefix("torch."), best["contender"], best["seconds"], best["gb_s"],
                best["limit_gb_s"], best["share_of_limit"], min(rivals) / best["seconds"] if rivals else None,
                {r["contender"]: r["share_of_limit"] for r in ours}, AIM if _is_aimed(op, shape) else None,
            )
        )  # fmt: skip
    return found


def _is_aimed(op: str, shape: str) -> bool:
    pattern, least = _AIMED.get(op, ("", 0))
    match = re.search(pattern, shape) if pattern else None
    return match is not None and int(match[1]) >= least


_32B = "latency-32b-"  # how the names of files begin


def _latency_8b(place: Place) -> dict[str, Any]:
    paths = place.results.glob(f"{place.prefix}latency-*.json")
    return _latency(path for path in paths if not path.name.startswith(f"{place.prefix}{_32B}"))


def _latency_32b(place: Place) -> dict[str, Any]:
    return _latency(place.results.glob(f"{place.prefix}{_32B}*.json"))


def _latency(paths: Iterable[Path]) -> dict[str, Any]:
    """The files as they are: every number in them counts, and a cut off one has its finished cells."""
    every = {path.stem: read_json(path) for path in sorted(paths)}
    files = {name: content for name, content in every.items() if content}
    if not files:
        return {}
    return {"measured": sum(len(measured(content)) for content in files.values()), "files": files}


def _agreement(place: Place) -> dict[str, Any]:
    greedy = read_json(place.file("greedy.json"))
    return {key: greedy[key] for key in ("settings", "ties", "complete", "agrees", "comparisons")} if greedy else {}


def _more(place: Place) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if speeds := read_json(place.file("throughput.json")):
        found["throughput"] = {key: speeds[key] for key in ("settings", "complete", "results")}
    if kernels := _kernels(place, "kernels-others.json"):
        found["kernels"] = kernels
    return found

"""The report of a comparison: a table for people, JSON for programs."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from pearl.bench.best_of_others import share_of_best
from pearl.bench.measure import MethodResult
from pearl.devices import cpu_cores
from pearl.installed import DISTRIBUTION, installed_version


def machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": name, "cores": cpu_cores(), "gpus": gpus, "system": platform.platform()}


def versions() -> dict[str, str]:
    packages = (DISTRIBUTION, "torch", "triton", "transformers")
    found = {package: version for package in packages if (version := installed_version(package)) is not None}
    return {"python": platform.python_version(), **found}


def commit() -> str | None:
    """Of the checkout that the package lies in; None for an installed copy, even inside someone else's checkout."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        command = [*git, "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict[str, Any]:
    """Of a report: what computed it."""
    return {"machine": machine(), "versions": versions(), "commit": commit()}


def table(results: Sequence[MethodResult], title: str) -> Table:
    """A section for each batch, if there are several; below, what a pace chose."""
    columns = ("method", "tok/s", "spread", "speedup", "accepted", "rate", "fwd/tok", "window", "efficiency")
    # Without edges it fits 80 columns.
    rows = Table(
        title=title, box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False,
        caption="\n".join(_choices(results)) or None, caption_justify="left", caption_style="",
    )  # fmt: skip
    for index, column in enumerate(columns):
        rows.add_column(column, justify="right" if index else "left", no_wrap=True)
    several, batch = len({r.batch for r in results}) > 1, None
    for r in results:
        if several and r.batch != batch:
            rows.add_section()
            rows.add_row(f"batch {r.batch}")
            batch = r.batch
        drafted = bool(r.window or r.acceptance_rate)  # prompt lookup may find nothing in most rounds
        rows.add_row(
            r.method,
            f"{r.tok_s:.1f}",
            "-" if r.spread is None else f"{r.spread:.1%}",
            f"{r.speedup:.2f}x",
            f"{r.mean_accepted_tokens:.2f}" if drafted else "-",
            f"{r.acceptance_rate:.3f}" if drafted else "-",
            f"{r.target_forwards / r.tokens:.3f}" if r.tokens else "-",
            f"{r.window:g}" if drafted else "-",
            f"{r.efficiency:.3f}",
        )
    return rows


def _choices(results: Sequence[MethodResult]) -> Iterator[str]:
    """Lines about modes, where a method's own was not the only one, what that reaches, and about prepared windows."""
    for r in results:
        if "@" not in r.method and r.method != "autoregressive":
            yield from _of_best(r, [other for other in results if other.batch == r.batch and other is not r])
        if set(r.modes) - {r.method.partition("@")[0]}:
            shares = ", ".join(f"{mode} {share:.0%}" for mode, share in r.modes.items())
            yield f"rounds of {r.method} at batch {r.batch}: {shares}"
        if r.prepared:
            shares = f"{r.prepared_hits / r.prepared:.0%} hit, {r.prepared_accepted:.0%} of accepted tokens"
            yield f"prepared by {r.method} at batch {r.batch}: {shares}"


def _of_best(chooser: MethodResult, others: Sequence[MethodResult]) -> Iterator[str]:
    share = share_of_best(chooser.speeds, {other.method: other.speeds for other in others})
    if share is not None:
        middle = f"{share.median:.2f} ({share.low:.2f}-{share.high:.2f})"
        yield f"{chooser.method} at batch {chooser.batch}: {middle} of the best by other repeats, {share.best}"


@dataclass(frozen=True)
class JsonReport:
    """A comparison's report, written anew after each run, so that whatever ends it leaves what was measured.

    ``complete`` in the file: whether every run is in it.
    """

    path: Path
    settings: dict[str, Any]
    origin: dict[str, Any] = field(default_factory=provenance)  # asked once, not between runs

    def write(self, results: Sequence[MethodResult], complete: bool = False) -> None:
        report = {
            **self.origin,
            "settings": self.settings,
            "complete": complete,
            "results": [asdict(result) for result in results],
        }
        write_whole(self.path, json.dumps(report, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """At once or not at all, where it is a file: whatever ends the program leaves the latest whole one. What is none (a
    device, a pipe) is written to. OSError names the path, which a full disk does not.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, "utf-8")
            return
        place = path.resolve()  # a link stays one
        partial = place.with_name(place.name + ".partial")
        partial.write_text(text, "utf-8")
        partial.replace(place)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error

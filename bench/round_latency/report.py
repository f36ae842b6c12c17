"""What the latency benchmark measured: JSON for programs, tables for people."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from pearl.bench.report import provenance, write_whole


@dataclass(frozen=True)
class Latencies:
    """Milliseconds are medians of rounds. ``tok_s`` and the like have a number for each method.

    decode: the target's forward of one token a request. verify: its forward of window + 1 tokens a request.
    draft_window: the draft's forwards of a window. All three while the other model rests.
    speculative_round: draft a window, then verify it. pearl_round: both at once; pearl_target_ms and pearl_draft_ms
    are the two models' times in it, in which they share what the device has.
    round_over_longer: a PEARL round over the longer of its two forwards, each computed again alone;
    round_over_longer_together: over the longer of them as they were in the round.
    overlap: both forwards alone, one after the other, over the round: 1 = nothing gained, 2 = all of the shorter.
    tok_s: committed tokens over the time of the rounds. tok_s_expected: the tokens that the acceptance rate gives on
    average in place of those that the measured rounds happened to have.
    """

    decode_ms: float
    verify_ms: float
    draft_window_ms: float
    speculative_round_ms: float
    pearl_round_ms: float
    pearl_target_ms: float
    pearl_draft_ms: float
    round_over_longer: float
    round_over_longer_together: float
    overlap: float
    tok_s: dict[str, float]
    tok_s_expected: dict[str, float]
    acceptance_rate: dict[str, float]


@dataclass(frozen=True)
class Cell:
    """One batch at one context. ``skipped`` says why numbers are missing.

    decode_bytes: what a decode step must read: the target's weights, and the keys and values of the context.
    share_of_read_limit: these over decode_ms, as a share of the measured read bandwidth.
    eager: the same without CUDA graphs, where it was measured.
    """

    target: str
    draft: str
    batch: int
    context: int
    skipped: str | None = None
    latencies: Latencies | None = None
    decode_bytes: int | None = None
    share_of_read_limit: float | None = None
    eager: Latencies | None = None

    def as_json(self) -> dict[str, Any]:
        content = asdict(self)
        return content | (content.pop("latencies") or {})


@dataclass
class Report:
    """What is known so far. ``label`` says what is synthetic about it."""

    settings: dict[str, Any]
    label: str
    read_bandwidth_gb_s: float = 0.0
    cells: list[Cell] = field(default_factory=list)
    interrupted: bool = False


def write_json(path: Path, report: Report) -> None:
    content = {
        "label": report.label,
        "settings": report.settings,
        **provenance(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "read_bandwidth_gb_s": report.read_bandwidth_gb_s,
        "cells": [cell.as_json() for cell in report.cells],
        "interrupted": report.interrupted,
    }
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_markdown(path: Path, report: Report) -> None:
    parts = [f"**{report.label}**", *(_caption(report)), ""]
    for title, rows in _grids(report):
        parts += [f"{title}:", "", _markdown_row(rows[0]), _markdown_row(["---:"] * len(rows[0]))]
        parts += [*map(_markdown_row, rows[1:]), ""]
    parts += [f"* {line}" for line in _left_out(report)]
    write_whole(path, "\n".join(parts).rstrip() + "\n")


def tables(report: Report) -> RenderableType:
    parts: list[RenderableType] = [report.label, *_caption(report)]
    for title, rows in _grids(report):
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False,
                      show_edge=False)  # fmt: skip
        for head in rows[0]:
            table.add_column(head, justify="right", no_wrap=True)
        for row in rows[1:]:
            table.add_row(*row)
        parts.append(table)
    return Group(*parts, *_left_out(report))


_Columns = Sequence[tuple[str, Callable[[Latencies], str]]]
_TIMES: _Columns = (
    ("decode", lambda x: _ms(x.decode_ms)),
    ("verify", lambda x: _ms(x.verify_ms)),
    ("draft", lambda x: _ms(x.draft_window_ms)),
    ("spec.", lambda x: _ms(x.speculative_round_ms)),
    ("PEARL", lambda x: _ms(x.pearl_round_ms)),
    ("alone", lambda x: f"{x.round_over_longer:.2f}"),
    ("in it", lambda x: f"{x.round_over_longer_together:.2f}"),
    ("overlap", lambda x: f"{x.overlap:.2f}"),
)
_SPEEDS: _Columns = (
    ("autoreg.", lambda x: f"{x.tok_s['autoregressive']:.1f}"),
    ("spec.", lambda x: f"{x.tok_s['speculative']:.1f}"),
    ("PEARL", lambda x: f"{x.tok_s['pearl']:.1f}"),
    ("spec. expected", lambda x: f"{x.tok_s_expected['speculative']:.1f}"),
    ("PEARL expected", lambda x: f"{x.tok_s_expected['pearl']:.1f}"),
)
_TITLES = (
    "ms: forwards alone, and rounds; a PEARL round over its longer forward, alone and in it",
    "tokens per second of the whole batch, measured, and expected at the acceptance rate",
)


def _grids(report: Report) -> list[tuple[str, list[list[str]]]]:
    """Titles and rows; a grid's first row are its heads."""
    times = [["cell", "mode", *(head for head, _ in _TIMES), "limit"]]
    speeds = [["cell", "mode", *(head for head, _ in _SPEEDS)]]
    graphs = "graphs" if report.settings["device"].startswith("cuda") else "cpu"
    for cell in report.cells:
        for mode, found in ((graphs, cell.latencies), ("eager", cell.eager)):
            if found is not None:
                key = [f"{cell.batch} x {cell.context}", mode]
                limit = cell.share_of_read_limit if found is cell.latencies else None
                times.append([*key, *(text(found) for _, text in _TIMES), "-" if limit is None else f"{limit:.0%}"])
                speeds.append([*key, *(text(found) for _, text in _SPEEDS)])
    return list(zip(_TITLES, (times, speeds), strict=True)) if len(times) > 1 else []


def _ms(value: float) -> str:
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1}f}"


def _caption(report: Report) -> list[str]:
    settings = report.settings
    return [
        f"window {settings['window']}, {settings['rounds']} rounds, {settings['device']}, {settings['dtype']}; "
        f"read bandwidth {report.read_bandwidth_gb_s:.0f} GB/s (limit: a decode step's share of it)"
    ]


def _left_out(report: Report) -> list[str]:
    lines = [f"batch {c.batch}, context {c.context} skipped: {c.skipped}" for c in report.cells if c.skipped]
    return [*lines, *(["interrupted: what is missing was not measured"] if report.interrupted else [])]


def _markdown_row(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"

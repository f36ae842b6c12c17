"""The cells of ``bench/latency.py`` in the GPU suite's summary and pictures; all of them under synthetic acceptance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.gpu_suite.markdown import number, share, table

READ_AIM, ROUND_AIM = 0.75, 1.1  # a decode step's share of the weight-reading limit; a round over its longer forward
SYNTHETIC = "synthetic acceptance: real forwards, scripted verdicts"
GRAPHS, EAGER = "graphs", "eager"
_METHODS = ("autoregressive", "speculative", "pearl")


@dataclass(frozen=True)
class RoundBars:
    """Milliseconds of a cell: both forwards alone, and the rounds made of them."""

    name: str
    verify: float
    draft: float
    pearl: float
    speculative: float
    over_longer: float


def round_bars(found: Mapping[str, Any]) -> list[RoundBars]:
    """Of rounds with graphs: cells that were measured again without them are in a file of their own."""
    return [
        RoundBars(
            f"{cell['target']}:{cell['draft']}, batch {cell['batch']}, context {cell['context']}",
            cell["verify_ms"], cell["draft_window_ms"], cell["pearl_round_ms"], cell["speculative_round_ms"],
            cell["round_over_longer"],
        )
        for name, content in found.get("files", {}).items()
        if not name.endswith("-eager")
        for cell in measured(content)
    ]  # fmt: skip


def measured(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [cell for cell in content["cells"] if cell.get("decode_ms") is not None]


def latency_sections(found: Mapping[str, Any]) -> list[str]:
    parts = []
    for content in found["files"].values():
        settings = content["settings"]
        parts.append(
            f"**{content['label']}**: window {settings['window']}, {settings['rounds']} rounds, {settings['device']}, "
            f"{settings['dtype']}; read bandwidth {number(content['read_bandwidth_gb_s'])} GB/s. Milliseconds, medians."
        )
        parts += [_times(content), _speeds(content)]
        parts += [
            f"Batch {cell['batch']}, context {cell['context']} skipped: {cell['skipped']}"
            for cell in content["cells"]
            if cell["skipped"]
        ]
        wanted = len(settings["batch"]) * len(settings["context"])
        if len(content["cells"]) < wanted:
            parts.append(f"Cut off: {len(content['cells'])} of {wanted} cells were reached.")
    return parts


def _modes(content: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str, Mapping[str, Any]]]:
    """(cell, mode, its numbers)"""
    graphs = GRAPHS if content["settings"]["device"].startswith("cuda") else "cpu"
    for cell in measured(content):
        yield cell, graphs, cell
        if cell.get("eager"):
            yield cell, EAGER, cell["eager"]


def _times(content: Mapping[str, Any]) -> str:
    rows = []
    for cell, mode, x in _modes(content):
        limit = cell["share_of_read_limit"] if mode != EAGER else None
        times = (x[f"{name}_ms"] for name in ("decode", "verify", "draft_window", "speculative_round", "pearl_round"))
        over = x["round_over_longer"]
        aims = (_verdict(mode, over <= ROUND_AIM), _verdict(mode, limit is not None and limit >= READ_AIM))
        rows.append(
            (cell["batch"], cell["context"], mode, *map(number, times), f"{over:.2f}", aims[0], f"{x['overlap']:.2f}",
             share(limit), aims[1])
        )  # fmt: skip
    head = (
        "batch", "context", "mode", "decode", "verify", "draft window", "speculative round", "PEARL round",
        "/ longer forward", f"<= {ROUND_AIM:g}", "overlap", "decode of read limit", f">= {READ_AIM:.0%}",
    )  # fmt: skip
    return table(head, rows, left=(2, 9, 12))


def _speeds(content: Mapping[str, Any]) -> str:
    """Tokens per second: of the measured rounds, and of as many tokens as the acceptance rate gives on average."""
    kinds = ("tok_s", "tok_s_expected")
    rows = [
        (cell["batch"], cell["context"], mode, *(number(x[kind][method]) for kind in kinds for method in _METHODS))
        for cell, mode, x in _modes(content)
    ]
    names: Sequence[str] = [f"{method}, {kind}" for kind in ("measured", "expected") for method in _METHODS]
    rate = content["settings"]["synthetic_acceptance"]
    return f"Tokens per second of the batch at a synthetic acceptance of {rate:g}:\n\n" + table(
        ("batch", "context", "mode", *names), rows, left=(2,)
    )


def _verdict(mode: str, reached: bool) -> str:
    """The aims are of a GPU that replays graphs."""
    if mode != GRAPHS:
        return ""
    return "reached" if reached else "MISSED"

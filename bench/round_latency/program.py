"""``python bench/latency.py``: forwards and rounds of real model shapes with random weights, under scripted verdicts.

Every (batch, context) is a cell. The report is written anew after each, so that an interruption keeps what is done.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.round_latency.cell import Interrupted, Load, measure
from bench.round_latency.memory import DoesNotFit, explaining_what_does_not_fit, require_host_room
from bench.round_latency.report import Cell, Latencies, Report, tables, write_json, write_markdown
from bench.shared.bandwidth import last_level_cache, read_bandwidth
from bench.shared.numbers import positive_numbers
from pearl.bench.command import run_command
from pearl.bench.options import check_output, check_rate, parse_shapes, rate_label
from pearl.bench.shapes import SHAPES, RandomDecoders, assemble_shapes, forward_bytes, random_decoders
from pearl.config import EngineConfig
from pearl.errors import ConfigurationError
from pearl.interrupts import INTERRUPTED, InterruptGuard
from pearl.models import KVCache
from pearl.models.weight_size import weight_bytes

_LARGE = 1 << 30  # bytes, of a buffer that no cache holds


def latency(
    shapes: Annotated[str, typer.Option(help="TARGET:DRAFT, of " + ", ".join(SHAPES))],
    batch: Annotated[str, typer.Option(help="Requests that run at once, comma-separated")] = "1,8,32",
    context: Annotated[str, typer.Option(help="Tokens of each in the cache, comma-separated")] = "1024,8192",
    synthetic_acceptance: Annotated[float, typer.Option(help="Probability that a drafted token holds")] = 0.8,
    window: Annotated[int, typer.Option(min=1, help="Drafted tokens a round")] = 6,
    rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each method in each cell")] = 40,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    draft_device: Annotated[str | None, typer.Option(help="The draft's, where it differs")] = None,
    target_device: Annotated[str | None, typer.Option(help="The target's, where it differs")] = None,
    draft_sms: Annotated[int | None, typer.Option(help="Keep a part of a shared GPU free for the draft")] = None,
    dtype: Annotated[str, typer.Option(help="auto (bfloat16) | float32 | bfloat16 | float16")] = "auto",
    eager_too: Annotated[
        bool | None, typer.Option("--eager-too/--no-eager-too", help="Also without CUDA graphs; default: on CUDA")
    ] = None,
    draft_threads: Annotated[int, typer.Option(min=1, help="CPU threads of the draft")] = 1,
    target_threads: Annotated[int, typer.Option(min=1, help="CPU threads of the target, in every method")] = 1,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the report here, after each cell")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write the tables here, after each cell")] = None,
) -> None:
    """Milliseconds of a decode step, a verification, a draft window and a round; tokens per second of the methods."""
    check_rate(synthetic_acceptance)
    pair = parse_shapes(shapes)
    batches, contexts = positive_numbers("--batch", batch), positive_numbers("--context", context)
    check_output("--json", json_out)
    check_output("--markdown", markdown)
    options: dict[str, Any] = {
        "device": device, "draft_device": draft_device, "target_device": target_device, "draft_sms": draft_sms,
        "dtype": dtype, "draft_threads": draft_threads, "target_threads": target_threads, "seed": 0,
    }  # fmt: skip
    config = EngineConfig(**options, window=window)
    loads = [Load(b, c, window, rounds, synthetic_acceptance) for b, c in product(batches, contexts)]
    _check_lengths(loads, pair, config)
    place = config.resolve_device("target")
    settings: dict[str, Any] = {
        "shapes": shapes, "batch": batches, "context": contexts, "synthetic_acceptance": synthetic_acceptance,
        "window": window, "rounds": rounds, "device": str(place), "draft_sms": draft_sms,
        "draft_device": str(config.resolve_device("draft")), "dtype": str(_dtype(config, pair[0]))[6:],
        "eager_too": place.type == "cuda" if eager_too is None else eager_too,
        "draft_threads": draft_threads, "target_threads": target_threads,
    }  # fmt: skip
    report = Report(settings, f"{shapes}, random weights; {rate_label(synthetic_acceptance)}")
    console = Console()
    with InterruptGuard() as guard:
        Bench(report, config, pair, (json_out, markdown), lambda: guard.requested).run(loads, console)
    console.print(tables(report))
    for path in filter(None, (json_out, markdown)):
        console.print(f"written to {path}")
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)


def _check_lengths(loads: Sequence[Load], pair: tuple[str, str], config: EngineConfig) -> None:
    longest = min(SHAPES[name].max_position_embeddings for name in pair)
    for load in loads:
        if load.context % config.page_size:
            raise ConfigurationError(f"--context must be a multiple of a KV page's {config.page_size}: {load.context}")
        if load.max_model_len > longest:
            raise ConfigurationError(
                f"--context {load.context} and what --rounds {load.rounds} may add are {load.max_model_len} positions, "
                f"{':'.join(pair)} have {longest}; lower one of them"
            )


def _dtype(config: EngineConfig, shape: str) -> torch.dtype:
    return config.torch_dtype or SHAPES[shape].dtype


@dataclass(frozen=True)
class Bench:
    """Fills a report, cell by cell. ``outputs``: JSON and markdown."""

    report: Report
    config: EngineConfig
    pair: tuple[str, str]
    outputs: tuple[Path | None, Path | None]
    stopped: Callable[[], bool]

    def run(self, loads: Sequence[Load], console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=console, refresh_per_second=2) as progress:  # drawing costs the engine time
            task = progress.add_task("read bandwidth", total=len(loads))
            self.report.read_bandwidth_gb_s = self._bandwidth()
            progress.update(task, description="weights")
            decoders = self._decoders(max(load.max_model_len for load in loads))
            for load in loads:
                progress.update(task, description=f"batch {load.batch}, context {load.context}")
                if self.stopped():
                    break
                try:
                    self.report.cells.append(self._cell(decoders, load))
                except Interrupted:
                    break
                self._write()
                progress.advance(task)
        self.report.interrupted = self.stopped()
        self._write()

    def _write(self) -> None:
        for path, write in zip(self.outputs, (write_json, write_markdown), strict=True):
            if path is not None:
                write(path, self.report)

    def _bandwidth(self) -> float:
        """GB/s of reading a buffer that no cache holds, on the target's device (``read_bandwidth`` says how)."""
        device = str(self.config.resolve_device("target"))
        size = min(_LARGE, 8 * last_level_cache(device))
        return read_bandwidth(size, device, self.config.resolve_threads()[1])

    def _decoders(self, max_model_len: int) -> RandomDecoders | DoesNotFit:
        """Once for all cells."""
        try:
            with explaining_what_does_not_fit():
                if self._on_host:
                    needed = sum(weight_bytes(SHAPES[name], _dtype(self.config, name)) for name in self.pair)
                    require_host_room("weights", needed)
                return random_decoders(self.config, *self.pair, max_model_len)
        except DoesNotFit as error:
            return error

    @property
    def _on_host(self) -> bool:
        return self.config.resolve_device("target").type == "cpu"

    def _cell(self, decoders: RandomDecoders | DoesNotFit, load: Load) -> Cell:
        cell = Cell(*self.pair, load.batch, load.context)
        if isinstance(decoders, DoesNotFit):
            return replace(cell, skipped=str(decoders))
        try:
            found = self._measure(decoders, load, enforce_eager=False)
            moved = self._decode_bytes(load)
            share = moved / (found.decode_ms * 1e-3) / (self.report.read_bandwidth_gb_s * 1e9)
            cell = replace(cell, latencies=found, decode_bytes=moved, share_of_read_limit=share)
            if self.report.settings["eager_too"]:
                cell = replace(cell, eager=self._measure(decoders, load, enforce_eager=True))
        except DoesNotFit as error:
            cell = replace(cell, skipped=str(error))
        return cell

    def _decode_bytes(self, load: Load) -> int:
        """The least that a decode step reads: the target's weights once, each request's keys and values."""
        shape, dtype = SHAPES[self.pair[0]], _dtype(self.config, self.pair[0])
        return forward_bytes(shape, dtype) + load.batch * load.context * KVCache.bytes_per_token(shape, dtype)

    def _measure(self, decoders: RandomDecoders, load: Load, enforce_eager: bool) -> Latencies:
        """Raises DoesNotFit or Interrupted. KV memory and graphs live as long as this call."""
        try:
            with explaining_what_does_not_fit():
                return self._measure_assembled(decoders, load, enforce_eager)
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _measure_assembled(self, decoders: RandomDecoders, load: Load, enforce_eager: bool) -> Latencies:
        config = replace(load.config(self.config), enforce_eager=enforce_eager)
        pages = load.batch * -(-load.max_model_len // config.page_size)
        what = f"keys and values of {load.batch} requests of {load.max_model_len} tokens"
        if self._on_host:
            token = sum(KVCache.bytes_per_token(shape, _dtype(config, self.pair[0])) for shape in decoders.configs)
            needed = pages * config.page_size * token
            require_host_room(what, needed)
            config = replace(config, kv_cache_memory=needed)
        models = assemble_shapes(config, decoders)
        if models.num_pages < pages:
            raise DoesNotFit(f"{what} need {pages} pages, there is room for {models.num_pages}")
        return measure(models, config, load, self.stopped)


def main() -> None:
    run_command(latency)

"""The command line of the report."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pearl_kernels.provider import Situation
from pearl_kernels.report.cuda_compile import SOURCES, cuda_jobs
from pearl_kernels.report.jobs import Job, run
from pearl_kernels.report.providers import provider_table, resolve
from pearl_kernels.report.resources import ARCHITECTURES, Compiled
from pearl_kernels.report.table import KernelTable, summary
from pearl_kernels.report.triton_jobs import triton_jobs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def report(
    device: Annotated[list[str] | None, typer.Option(help="Device types to explain; default: those here.")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the tensors: {', '.join(DTYPES)}.")] = "bfloat16",
    head_dim: Annotated[int, typer.Option(min=1, help="Width of an attention head.")] = 128,
    arch: Annotated[list[int] | None, typer.Option(help=f"Compile for sm_ARCH; default: {ARCHITECTURES}.")] = None,
    kernels: Annotated[str, typer.Option(help="Compile what has this in its name; * and ? stand for anything.")] = "",
    compile_kernels: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the GPU kernels.")] = True,
    processes: Annotated[int, typer.Option(min=1, help="Compilers at a time.")] = 2,
    csrc: Annotated[Path, typer.Option(help="Where the native sources are.")] = SOURCES,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
) -> None:
    """Which provider runs each operator and why, and what every GPU kernel takes when compiled.

    Exit status 1: a kernel does not compile, fits no multiprocessor, or spills registers without an explanation.
    """
    if dtype not in DTYPES:
        raise typer.BadParameter(f"{dtype!r} is not one of {', '.join(DTYPES)}", param_hint="--dtype")
    if wrong := set(arch or ()) - set(ARCHITECTURES):
        raise typer.BadParameter(f"{min(wrong)} is not one of {ARCHITECTURES}", param_hint="--arch")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    found: dict[str, Any] = {"providers": {}, "notes": [], "kernels": []}
    for name in device or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]):
        situation = Situation(name, DTYPES[dtype], head_dim, torch.get_num_threads())
        resolved = resolve(situation)
        found["providers"][name] = {op: [dataclasses.asdict(s) for s in lines] for op, lines in resolved.items()}
        console.print(provider_table(situation, resolved))
    compiled: list[Compiled] = []
    if compile_kernels:
        jobs, found["notes"] = _jobs(arch or ARCHITECTURES, kernels, csrc)
        for note in found["notes"]:
            console.print(f"[yellow]{note}[/]")
        compiled = _compile(jobs, processes, console)
    found["kernels"] = [_record(kernel) for kernel in compiled]
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=1) + "\n")
    if any(kernel.problem for kernel in compiled):
        raise typer.Exit(1)


def _jobs(architectures: Sequence[int], pattern: str, csrc: Path) -> tuple[list[Job], list[str]]:
    """CUDA's first: they take longest. Notes say what cannot be compiled here."""
    cuda, no_cuda = cuda_jobs(architectures, csrc)
    triton, no_triton = triton_jobs(architectures)
    every: list[Job] = [*cuda, *triton]
    jobs = [job for job in every if fnmatch.fnmatchcase(job.name, f"*{pattern}*")]
    if every and not jobs:
        names = ", ".join(dict.fromkeys(job.name for job in every))
        raise typer.BadParameter(f"{pattern!r} is in none of {names}", param_hint="--kernels")
    return jobs, [note for note in (no_cuda, no_triton) if note]


def _compile(jobs: Sequence[Job], processes: int, console: Console) -> list[Compiled]:
    begin = time.perf_counter()
    table, kernels = KernelTable(console), []
    progress = Progress(
        TextColumn("compiling"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("", total=len(jobs))
        for results in run(jobs, processes):
            for kernel in results:
                table.add(kernel)
                kernels.append(kernel)
            progress.advance(task)
    console.print(summary(kernels, time.perf_counter() - begin))
    return kernels


def _record(kernel: Compiled) -> dict[str, Any]:
    warps = kernel.usage.warps(kernel.arch) if kernel.usage else None
    return {**dataclasses.asdict(kernel), "warps": warps, "problem": kernel.problem}


def application() -> typer.Typer:
    """The command line, built anew for each use: it is no module state."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(report)
    return app


if __name__ == "__main__":
    application()(prog_name="python -m pearl_kernels.report")

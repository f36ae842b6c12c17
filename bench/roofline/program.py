"""``python bench/cpu_roofline.py``: how near to this machine's memory speed the CPU kernels come, and what it gives.

Everything is measured in one run and in turns, because a shared machine's speed wanders: the read bandwidth beside the
forwards, this engine beside transformers and llama.cpp. Ctrl-C ends the run and keeps what is there.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.roofline.generators import (
    Contender,
    LeftOut,
    Tokens,
    compare,
    intra_op_threads,
    llama_cpp_contenders,
    pearl_contenders,
    transformers_contenders,
)
from bench.roofline.measure_forwards import ROUNDS, measure_forwards
from bench.roofline.report import Generation, Report, draw, tables, write_json
from pearl.bench.command import run_command
from pearl.bench.options import check_output, check_picture, whole_number
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.config import NGRAM
from pearl.devices import cpu_cores
from pearl.errors import ConfigurationError
from pearl.interrupts import INTERRUPTED, InterruptGuard
from pearl.llm import LLM
from pearl.models import bundled_path
from pearl.user_values import shown

ENGINES = ("pearl", "transformers", "llama.cpp")
_QUICK = {"prompts": 1, "max_tokens": 8, "repeats": 1, "rows": "1,4"}

Advance = Callable[[str], None]
Stopped = Callable[[], bool]


def roofline(
    dataset: Annotated[str, typer.Option(help="builtin, humaneval, gsm8k, mt_bench, mgsm or a JSONL file")] = BUILT_IN,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest output")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Of everything, in turns")] = 5,
    engines: Annotated[str, typer.Option(help="Comma-separated")] = ",".join(ENGINES),
    rows: Annotated[str, typer.Option(help="Rows of the forwards, comma-separated")] = "1,2,4,8,16",
    context: Annotated[int, typer.Option(min=1, help="Tokens of the sequence in the forwards")] = 128,
    pace: Annotated[str, typer.Option(help="Of our method pearl: auto | balanced")] = "auto",
    target: Annotated[str | None, typer.Option(help="Local folder; default: the bundled pair")] = None,
    draft: Annotated[str | None, typer.Option(help="Local folder")] = None,
    dtype: Annotated[str, typer.Option(help="auto | float32 | bfloat16")] = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the report here")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw it here, PNG or SVG")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Try it: one prompt, one repeat, few rows")] = False,
) -> None:
    """Read bandwidth, the models' forwards and operators against it, and generation beside other engines; medians."""
    settings: dict[str, Any] = {
        "dataset": dataset, "prompts": prompts, "max_tokens": max_tokens, "repeats": repeats, "engines": engines,
        "rows": rows, "context": context, "pace": pace, "target": target or "bundled",
        "draft": draft or "bundled", "dtype": dtype, "quick": quick,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
    }  # fmt: skip
    if quick:
        settings |= _QUICK
    chosen = _chosen_engines(engines)
    counts = _row_counts(settings["rows"], context)
    _check_outputs(json_out, plot)
    if draft == NGRAM:
        raise ConfigurationError("the roofline measures a draft model; give a folder or leave --draft out")
    texts = load_prompts(dataset, settings["prompts"])
    options = {
        "target": target, "draft": draft, "device": "cpu", "dtype": dtype, "pace": pace,
        "max_num_seqs": 1, "prefix_caching": False,
    }  # fmt: skip
    report = Report(settings)
    console = Console()
    with InterruptGuard() as guard:
        _measure(console, report, options, chosen, texts, counts, lambda: guard.requested)
    console.print(tables(report))
    for path, write in ((json_out, write_json), (plot, _plot)):
        if path is not None:
            write(path, report)
            console.print(f"written to {path}")
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)


def _plot(path: Path, report: Report) -> None:
    draw(report, path)


def _chosen_engines(engines: str) -> list[str]:
    chosen = [name.strip() for name in engines.split(",") if name.strip()]
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(ENGINES):
        raise ConfigurationError(f"--engines takes each of {', '.join(ENGINES)} at most once, not {engines!r}")
    return chosen


def _row_counts(rows: str, context: int) -> list[int]:
    numbers = {whole_number(name.strip()) or 0 for name in rows.split(",")}
    if not all(1 <= number <= context for number in numbers):
        raise ConfigurationError(
            f"--rows takes numbers from 1 to the context's {context}, with commas, not {shown(rows)}"
        )
    return sorted(numbers)


def _check_outputs(json_out: Path | None, plot: Path | None) -> None:
    check_output("--json", json_out)
    check_picture("--plot", plot)


def _measure(
    console: Console,
    report: Report,
    options: dict[str, Any],
    engines: Sequence[str],
    texts: Sequence[str],
    rows: Sequence[int],
    stopped: Stopped,
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    settings = report.settings
    with ExitStack() as stack, Progress(*columns, console=console, refresh_per_second=2) as progress:
        task = progress.add_task("loading", total=ROUNDS * settings["repeats"])
        llm = stack.enter_context(LLM(**options, method="pearl", draft_threads=1, target_threads=1))
        report.dtype = str(llm.models.target.model.dtype).removeprefix("torch.")
        ids = _token_ids(llm, texts, settings["max_tokens"], settings["context"])

        def advance(name: str) -> None:
            progress.update(task, advance=1, description=name)

        with intra_op_threads(1), torch.inference_mode():
            measure_forwards(report, llm, rows, cpu_cores(), stopped, advance)
        if not stopped():
            contenders = _contenders(stack, report, llm, options, engines)
            progress.update(task, total=settings["repeats"] * (ROUNDS + len(contenders)))
            _measure_generation(report, contenders, ids, stopped, advance)
    report.interrupted = stopped()


def _token_ids(llm: LLM, texts: Sequence[str], max_tokens: int, context: int) -> Tokens:
    """Of the prompts. Everything must fit: engines end differently at the end of the context."""
    ids = [llm.encode(text) for text in texts]
    longest = max(map(len, ids)) + max_tokens
    if longest > llm.max_model_len:
        raise ConfigurationError(
            f"a prompt with --max-tokens {max_tokens} takes {longest} positions, the model has {llm.max_model_len}"
        )
    if context > llm.max_model_len:
        raise ConfigurationError(f"--context {context}: the model has {llm.max_model_len} positions")
    return ids


def _contenders(
    stack: ExitStack, report: Report, llm: LLM, options: dict[str, Any], engines: Sequence[str]
) -> list[Contender]:
    cores = sorted({1, cpu_cores()})
    target, draft = (options[role] or str(bundled_path(role)) for role in ("target", "draft"))
    contenders: list[Contender] = []
    if "pearl" in engines:
        contenders += pearl_contenders(stack, llm, 1)
        if cores[-1] > 1:
            wide = LLM(**options, method="pearl", draft_threads=cores[-1], target_threads=cores[-1])
            contenders += pearl_contenders(stack, stack.enter_context(wide), cores[-1])
    if "transformers" in engines:
        contenders += transformers_contenders(llm, target, draft, cores)
    if "llama.cpp" in engines:
        found = llama_cpp_contenders(stack, llm, target, cores)
        if isinstance(found, LeftOut):
            report.left_out.append(found)
        else:
            contenders += found
    return contenders


def _measure_generation(
    report: Report, contenders: Sequence[Contender], ids: Tokens, stopped: Stopped, advance: Advance
) -> None:
    compare(contenders, ids, report.settings["max_tokens"], report.settings["repeats"], stopped, advance)
    done = [contender for contender in contenders if contender.runs]
    speeds = {id(c): statistics.median(run.tok_s for run in c.runs) for c in done}
    plain = [speeds[id(c)] for c in done if (c.engine, c.method) == ("transformers", "generate")]
    ours = next((c.runs[0].tokens for c in done if c.engine == "pearl"), None)
    for c in done:
        tokens = c.runs[0].tokens
        decoding = [speed for run in c.runs if (speed := run.decode_tok_s) is not None]
        report.generation.append(
            Generation(
                engine=c.engine,
                method=c.method,
                threads=c.threads,
                dtype=c.dtype,
                tok_s=speeds[id(c)],
                tokens=sum(map(len, tokens)),
                seconds=statistics.median(run.seconds for run in c.runs),
                decode_tok_s=statistics.median(decoding) if decoding else None,
                speedup=speeds[id(c)] / max(plain) if plain else None,
                same_tokens=None if ours is None else sum(map(list.__eq__, tokens, ours)) / len(ours),
            )
        )


def main() -> None:
    run_command(roofline)

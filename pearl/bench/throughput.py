"""``python bench/throughput.py`` and ``pearl bench``: decoding methods side by side on one pair."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pearl.bench.measure import MethodResult, compare
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.bench.report import table, write_json
from pearl.config import EngineConfig, MethodName
from pearl.errors import ConfigurationError, PearlError
from pearl.llm import LLM
from pearl.sampling_params import SamplingParams

ALL_METHODS = ",".join(reversed(get_args(MethodName)))


def throughput(
    dataset: Annotated[str, typer.Option(help="builtin, humaneval, gsm8k, mt_bench, mgsm or a JSONL file")] = BUILT_IN,
    methods: Annotated[str, typer.Option(help="Comma-separated; the first is the baseline")] = ALL_METHODS,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest output")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each method, interleaved")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Requests that run at once")] = 1,
    window: Annotated[str, typer.Option(help="Drafted tokens a round, or auto")] = "auto",
    window_rule: Annotated[str, typer.Option(help="Of auto: balanced | fastest")] = "balanced",
    verification: Annotated[str, typer.Option(help="rejection | coupled")] = "rejection",
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at end of text")] = False,
    target: Annotated[str | None, typer.Option(help="Path or hub id; default: the bundled pair")] = None,
    draft: Annotated[str | None, typer.Option(help='Path or hub id, or "ngram"')] = None,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto | float32 | bfloat16 | float16")] = "auto",
    draft_threads: Annotated[int, typer.Option(min=1, help="CPU threads of the draft")] = 1,
    target_threads: Annotated[int, typer.Option(min=1, help="CPU threads of the target, in every method")] = 1,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the report here")] = None,
) -> None:
    """Tokens per second of the decoding methods, interleaved, on the same prompts; medians. Warm-up is not counted."""
    console = Console()
    settings: dict[str, Any] = {
        "dataset": dataset, "prompts": prompts, "max_tokens": max_tokens, "repeats": repeats, "batch_size": batch_size,
        "window": window, "window_rule": window_rule,
        "verification": verification, "temperature": temperature, "ignore_eos": ignore_eos,
        "target": target or "bundled", "draft": draft or "bundled", "device": device, "dtype": dtype,
        "draft_threads": draft_threads, "target_threads": target_threads,
    }  # fmt: skip
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"--methods must name each method once, separated by commas, not {methods!r}")
    if window != "auto" and not window.isdecimal():
        raise ConfigurationError(f'--window must be "auto" or an integer >= 1, not {window!r}')
    if json_out is not None and not json_out.absolute().parent.is_dir():
        raise ConfigurationError(f"--json: the folder {json_out.parent} does not exist")
    if json_out is not None and json_out.is_dir():
        raise ConfigurationError(f"--json: {json_out} is a folder; name a file")
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=ignore_eos, seed=0)
    options: dict[str, Any] = {
        "target": target, "draft": draft, "device": device, "dtype": dtype, "verification": verification,
        "window": window if window == "auto" else int(window), "window_rule": window_rule, "max_num_seqs": batch_size,
        "draft_threads": draft_threads, "target_threads": target_threads, "prefix_caching": False,
    }  # fmt: skip
    for name in names:
        EngineConfig(**{**options, "method": name})  # refuse a bad option before anything is loaded
    texts = load_prompts(dataset, prompts)
    results = _run(console, names, options, texts, params, repeats)
    console.print(table(results, f"{dataset}: {len(texts)} prompts, up to {max_tokens} tokens, batch {batch_size}"))
    if json_out is not None:
        write_json(json_out, results, settings)
        console.print(f"written to {json_out}")


def _run(
    console: Console, names: list[str], options: dict[str, Any], texts: list[str], params: SamplingParams, repeats: int
) -> list[MethodResult]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, refresh_per_second=2) as progress:  # drawing costs the engine time
        task = progress.add_task("loading", total=len(names) * repeats * (len(texts) + 1))
        # The pair is loaded once; "pearl" loads a draft whatever the methods are.
        with LLM(**{**options, "method": "pearl"}) as first:
            contenders = {name: first.variant(method=name) for name in names}
            try:
                return compare(
                    contenders, texts, params, repeats, lambda name: progress.update(task, advance=1, description=name)
                )
            finally:
                for llm in contenders.values():
                    llm.close()


def main() -> None:
    try:
        typer.run(throughput)
    except PearlError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)

"""``python bench/throughput.py`` and ``pearl bench``: decoding methods side by side on one pair."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from pearl.bench.command import run_command
from pearl.bench.contenders import FORMS, Contender, parse_contenders
from pearl.bench.options import (
    check_output,
    check_picture,
    check_rate,
    parse_shapes,
    positive_numbers,
    rate_label,
    whole_number,
)
from pearl.bench.prompt_sets import BUILT_IN
from pearl.choices import BackendName, MethodName, ShapeName
from pearl.errors import ConfigurationError
from pearl.sampling_params import SamplingParams
from pearl.user_values import shown

_LONGEST_PROMPT = 1 << 20
ALL_METHODS = ",".join(reversed(get_args(MethodName)))
# Settings that are options of the engine too.
_OF_ENGINE = (
    "device", "dtype", "verification", "draft_device", "target_device", "enforce_eager", "draft_threads",
    "target_threads", "backend",
)  # fmt: skip

_Window = Annotated[
    str, typer.Option(help="Drafted tokens a round where --methods names none, or auto: as the pace decides")
]
_Shapes = Annotated[
    str | None, typer.Option(help="TARGET:DRAFT, random weights of these shapes: " + ", ".join(get_args(ShapeName)))
]
_PromptTokens = Annotated[
    int | None,
    typer.Option(min=1, max=_LONGEST_PROMPT, help="With --shapes: length of each prompt, instead of the data set's"),
]
_Acceptance = Annotated[
    float | None, typer.Option(help="Script the verdicts: each drafted token holds with this probability")
]
_Backend = Annotated[BackendName, typer.Option(help="native, or transformers: any other family; auto: either")]
_DraftThreads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of the draft, in every method; default: as PEARL's")
]


def throughput(
    dataset: Annotated[str, typer.Option(help="builtin, humaneval, gsm8k, mt_bench, mgsm or a JSONL file")] = BUILT_IN,
    methods: Annotated[str, typer.Option(help=f"Comma-separated: {FORMS}; the first is the baseline")] = ALL_METHODS,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts, at least")] = 8,
    waves: Annotated[
        int, typer.Option(min=1, help="Prompts for each place of a batch, at least: few are soon over")
    ] = 4,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest output")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each method, interleaved")] = 5,
    batch: Annotated[str, typer.Option(help="Requests that run at once, max_num_seqs; several comma-separated")] = "1",
    window: _Window = "auto",
    verification: Annotated[str, typer.Option(help="rejection | coupled | block")] = "rejection",
    temperature: Annotated[float, typer.Option(min=0)] = 0.0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at end of text")] = False,
    target: Annotated[str | None, typer.Option(help="Path or hub id; default: the bundled pair")] = None,
    draft: Annotated[str | None, typer.Option(help='Path or hub id, or "ngram"')] = None,
    shapes: _Shapes = None,
    prompt_tokens: _PromptTokens = None,
    synthetic_acceptance: _Acceptance = None,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    draft_device: Annotated[str | None, typer.Option(help="The draft's, where it differs")] = None,
    target_device: Annotated[str | None, typer.Option(help="The target's, where it differs")] = None,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="On CUDA: no CUDA graphs")] = False,
    backend: _Backend = "auto",
    dtype: Annotated[str, typer.Option(help="auto | float32 | bfloat16 | float16")] = "auto",
    draft_threads: _DraftThreads = None,
    target_threads: Annotated[int | None, typer.Option(min=1, help="Likewise of the target")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the report here, anew after each run")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw tokens per second here, PNG or SVG")] = None,
) -> None:
    """Tokens per second of the decoding methods, interleaved, on the same prompts; medians. Warm-up is not counted."""
    if window != "auto" and not whole_number(window):
        raise ConfigurationError(f'--window must be "auto" or an integer >= 1, not {shown(window)}')
    contenders = parse_contenders(methods, "auto" if window == "auto" else int(window))
    batches = positive_numbers("--batch", batch)
    settings: dict[str, Any] = {
        "dataset": dataset, "methods": [contender.name for contender in contenders], "prompts": prompts,
        "waves": waves, "max_tokens": max_tokens, "repeats": repeats, "batch": batches, "window": window,
        "verification": verification, "temperature": temperature, "ignore_eos": ignore_eos,
        "target": target or "bundled", "draft": draft or "bundled", "shapes": shapes, "prompt_tokens": prompt_tokens,
        "synthetic_acceptance": synthetic_acceptance, "device": device, "draft_device": draft_device,
        "target_device": target_device, "enforce_eager": enforce_eager, "backend": backend, "dtype": dtype,
        "draft_threads": draft_threads, "target_threads": target_threads,
    }  # fmt: skip
    check_output("--json", json_out)
    check_picture("--plot", plot)
    pair = _check_shapes(settings)
    options = {name: settings[name] for name in _OF_ENGINE}
    options |= {"target": target, "draft": draft, "prefix_caching": False}
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens, ignore_eos=ignore_eos, seed=0)
    _compare(contenders, batches, settings, options, params, pair, json_out, plot)


def _compare(
    contenders: list[Contender],
    batches: list[int],
    settings: dict[str, Any],
    options: dict[str, Any],
    params: SamplingParams,
    pair: tuple[str, str] | None,
    json_out: Path | None,
    plot: Path | None,
) -> None:
    """Run the contenders, and print, write and draw what came out."""
    # What follows needs torch, for which --help and the refusals before do not wait.
    from rich.console import Console

    from pearl.bench.contest import Contest, check_contenders, read_prompts
    from pearl.bench.report import JsonReport, table

    check_contenders(contenders, options, batches)
    prompts, waves, acceptance = settings["prompts"], settings["waves"], settings["synthetic_acceptance"]
    count = max(prompts, waves * max(batches))
    there = read_prompts(settings["dataset"], count, pair, settings["prompt_tokens"])
    settings["different_prompts"] = len(there)
    contest = Contest(
        contenders, options, batches, there, prompts, waves, params, settings["repeats"], pair, acceptance
    )  # fmt: skip
    console = Console()
    label = _label(settings)
    report = None if json_out is None else JsonReport(json_out, settings | {"label": label} if label else settings)
    results = contest.run(console, (lambda results: None) if report is None else report.write)
    title = _title(label or settings["dataset"], [len(contest.prompts_of(size)) for size in batches], settings)
    console.print(table(results, title))
    if report is not None:
        report.write(results, complete=True)
        console.print(f"written to {report.path}")
    if plot is not None:
        from pearl.bench.plot import draw_speeds

        draw_speeds(results, title, plot)
        console.print(f"written to {plot}")


def _title(of: str, prompts: list[int], settings: dict[str, Any]) -> str:
    """``prompts``: of each batch."""
    few, many, there = min(prompts), max(prompts), settings["different_prompts"]
    number = str(many) if few == many else f"{few} to {many}"
    repeated = f" ({there} different)" if there < many else ""
    batches = ", ".join(map(str, settings["batch"]))
    return f"{of}\n{number} prompts{repeated}, up to {settings['max_tokens']} tokens, batch {batches}"


def _check_shapes(settings: dict[str, Any]) -> tuple[str, str] | None:
    """The pair that --shapes names, if it does. ConfigurationError for options that do not go together."""
    if settings["synthetic_acceptance"] is not None:
        check_rate(settings["synthetic_acceptance"])
    if settings["shapes"] is None:
        if settings["prompt_tokens"] is not None:
            raise ConfigurationError("--prompt-tokens is for random prompts, which --shapes has; leave it out")
        return None
    pair = parse_shapes(settings["shapes"])
    if settings["target"] != "bundled" or settings["draft"] != "bundled":
        raise ConfigurationError("--shapes makes random weights; it excludes --target and --draft")
    settings |= {"target": f"{pair[0]}, random weights", "draft": f"{pair[1]}, random weights"}
    return pair


def _label(settings: dict[str, Any]) -> str:
    """What makes these numbers other than those of a model at work; empty if nothing does."""
    shapes, rate = settings["shapes"], settings["synthetic_acceptance"]
    random = [] if shapes is None else [f"{shapes}, random weights, random prompts"]
    return "; ".join([*random, *([] if rate is None else [rate_label(rate)])])


def main() -> None:
    run_command(throughput)

"""``python bench/cpu_decoding.py``: plain greedy decoding of one model, this engine beside llama.cpp.

Both do the same work: the same token ids go in and ids come out, the weights are the same in one dtype, so many new
tokens whatever ends a text, so many threads for prompts and decoding. Prompts are timed apart from decoding. Each
measurement is a process of its own, the engines take turns, and a ratio is that of two neighbours: where a process lies
in memory, and the mood of a shared machine, then meet both alike. OpenMP's environment variables are left out, because
llama.cpp's threads wait by them and ours do not.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench.roofline.decoding_process import ENGINES, Job, Timed
from bench.roofline.gguf_export import write_gguf
from bench.roofline.llama_cpp import INSTALL, load_library
from bench.roofline.near_ties import widest_gap
from pearl.bench.command import run_command
from pearl.bench.options import check_output, positive_numbers
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.bench.report import provenance, write_whole
from pearl.errors import ConfigurationError
from pearl.llm import LLM
from pearl.models import bundled_path
from pearl.user_values import shown

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Speed:
    """Of one engine's processes. ``spread``: highest minus lowest over the median."""

    engine: str
    threads: int
    tok_s: list[float]  # of decoding alone, a process each
    prompt_ms: float  # of a prompt, the median

    @property
    def median(self) -> float:
        return statistics.median(self.tok_s)

    @property
    def spread(self) -> float:
        return (max(self.tok_s) - min(self.tok_s)) / self.median


def decoding(
    target: Annotated[str | None, typer.Option(help="Local folder of a plain Llama model; default: bundled")] = None,
    dataset: Annotated[str, typer.Option(help="builtin, humaneval, gsm8k, mt_bench, mgsm or a JSONL file")] = BUILT_IN,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, help="New tokens of each")] = 96,
    passes: Annotated[int, typer.Option(min=1, help="Over the prompts, in a process")] = 4,
    pairs: Annotated[int, typer.Option(min=1, help="Processes of each engine")] = 5,
    threads: Annotated[str, typer.Option(help="Comma-separated")] = "1,2",
    dtype: Annotated[str, typer.Option(help="float32 | bfloat16")] = "bfloat16",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the report here")] = None,
) -> None:
    """Tokens per second of plain decoding without prompts, beside llama.cpp; ratios of neighbouring processes."""
    if dtype not in _DTYPES:
        raise ConfigurationError(f"--dtype takes {' or '.join(_DTYPES)}, not {shown(dtype)}")
    counts = positive_numbers("--threads", threads)
    check_output("--json", json_out)
    try:
        load_library()
    except ImportError as error:
        raise ConfigurationError(f"llama.cpp is not installed ({error}): {INSTALL}") from error
    folder = target or str(bundled_path("target"))
    ids = _token_ids(folder, load_prompts(dataset, prompts), max_tokens)
    console = Console()
    report: dict[str, Any] = {
        **provenance(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv), "results": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / "model.gguf"
        write_gguf(Path(folder), gguf, _DTYPES[dtype])
        for count in counts:
            job = Job("", folder, dtype, count, ids, max_tokens, passes)
            report["results"].append(_compare(console, job, str(gguf), pairs))
    if json_out is not None:
        write_whole(json_out, json.dumps(report, indent=2) + "\n")
        console.print(f"written to {json_out}")


def _token_ids(folder: str, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    with LLM(target=folder, method="autoregressive", device="cpu", max_num_seqs=1) as llm:
        ids = [llm.encode(text) for text in texts]
        longest = max(map(len, ids)) + max_tokens
        if longest > llm.max_model_len:
            raise ConfigurationError(
                f"a prompt with --max-tokens {max_tokens} takes {longest} positions, the model has {llm.max_model_len}"
            )
    return ids


def _compare(console: Console, job: Job, gguf: str, pairs: int) -> dict[str, Any]:
    """Processes in turns, the order of a pair changing; shows and returns what they measured."""
    runs: dict[str, list[Timed]] = {engine: [] for engine in ENGINES}
    for index in range(pairs):
        for engine in ENGINES if index % 2 == 0 else ENGINES[::-1]:
            model = gguf if engine == "llama.cpp" else job.model
            runs[engine].append(_run(replace(job, engine=engine, model=model)))
    speeds = [speed_of(engine, job, timed) for engine, timed in runs.items()]
    ratios = [ours / theirs for ours, theirs in zip(speeds[0].tok_s, speeds[1].tok_s, strict=True)]
    ours, theirs = (runs[engine][0].tokens for engine in ENGINES)
    gap = widest_gap(job.model, job.prompts, ours, theirs)
    for speed in speeds:
        console.print(
            f"{speed.engine}, {job.threads} thread(s): {speed.median:.1f} tok/s decoding (spread {speed.spread:.0%}), "
            f"{speed.prompt_ms:.1f} ms a prompt"
        )
    equal = sum(map(list.__eq__, ours, theirs))
    console.print(
        f"ratio of neighbours: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"{equal} of {len(ours)} prompts give the same tokens" + ("" if gap is None else f"; others part at a "
        f"token that is at most {gap:.3f} below the likeliest in float32")
    )  # fmt: skip
    return {
        "threads": job.threads, "speeds": [{**asdict(s), "median": s.median, "spread": s.spread} for s in speeds],
        "ratios": ratios, "ratio": statistics.median(ratios), "equal_prompts": equal, "prompts": len(ours),
        "widest_gap": gap, "llama_cpp_build": runs["llama.cpp"][0].build,
    }  # fmt: skip


def speed_of(engine: str, job: Job, runs: Sequence[Timed]) -> Speed:
    tokens = job.passes * len(job.prompts) * (job.max_tokens - 1)
    prompt_ms = statistics.median(run.prompt_seconds for run in runs) / (job.passes * len(job.prompts)) * 1e3
    return Speed(engine, job.threads, [tokens / run.decode_seconds for run in runs], prompt_ms)


def _run(job: Job) -> Timed:
    """In a new process. ConfigurationError says what it ended with."""
    root = Path(__file__).resolve().parents[2]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "bench.roofline.decoding_process"]
    finished = subprocess.run(
        command, input=json.dumps(asdict(job)), capture_output=True, text=True, env=environment, check=False
    )
    if finished.returncode != 0:
        last = finished.stderr.strip().splitlines()[-1:] or [f"it ended with {finished.returncode}"]
        raise ConfigurationError(f"{job.engine} with {job.threads} thread(s): {last[0]}")
    return Timed(**json.loads(finished.stdout.splitlines()[-1]))


def main() -> None:
    run_command(decoding)

"""Predicted beside measured: what prepared windows bring, and where the time goes.

A run traces what the draft says of each token of the target's outputs, and how long forwards take. From these the
rounds of every contestant are played again (``rounds``), which says how fast each should have been, and how fast it
would be with a draft on a device of its own.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.shared.round_times import only_decodes, together
from bench.simulation.ranks import TracedText, trace
from bench.simulation.rounds import PlayedRound, play
from bench.simulation.times import ForwardTimes, overhead
from pearl.bench.command import run_command
from pearl.bench.contenders import Contender, parse_contenders
from pearl.bench.measure import answered
from pearl.bench.options import check_output
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.bench.report import provenance, write_whole
from pearl.engine.odds import Odds
from pearl.engine.rounds import RoundRecord, measured
from pearl.errors import ConfigurationError
from pearl.llm import LLM
from pearl.pace import MeasuredRound
from pearl.sampling_params import SamplingParams

DEFAULT = "autoregressive,speculative@4,pearl@4,pearl@4+2,pearl@4+6"
HEADINGS = (
    "",
    "measured",
    "predicted",
    "difference",
    "apart",
    "apart, rows free",
    "hits",
    "draft alone",
    "both",
    "target alone",
    "host",
)


@dataclass
class Run:
    """A contestant's rounds that only decoded."""

    contender: Contender
    rounds: list[MeasuredRound] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("draft", "both", "target", "host"), 0.0))

    def add(self, record: RoundRecord) -> None:
        if not only_decodes(record) or record.plan.load is None:
            return
        one = measured(record)
        self.rounds.append(one)
        target, draft = record.target, record.proposal.busy
        either = together([target, draft])
        for part, seconds in (
            ("draft", either - target.seconds), ("both", target.seconds + draft.seconds - either),
            ("target", either - draft.seconds), ("host", one.seconds - either),
        ):  # fmt: skip
            self.parts[part] += seconds

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return sum(r.committed for one in self.rounds for r in one.requests) / sum(one.seconds for one in self.rounds)

    @property
    def hits(self) -> tuple[int, int]:
        """Rejections that found their window, of how many."""
        return sum(one.hits for one in self.rounds), sum(one.rejections for one in self.rounds)

    def played(self, texts: Sequence[TracedText]) -> list[PlayedRound]:
        contender, odds = self.contender, Odds("rejection")
        window = contender.window if isinstance(contender.window, int) else 1
        branches = contender.prepared if isinstance(contender.prepared, int) else 0
        return [one for text in texts for one in play(contender.method, window, branches, text, odds)]


def predicted(played: Sequence[PlayedRound], times: ForwardTimes, beyond: float) -> float:
    """Tokens per second; ``beyond``: seconds of a round that are no forward's."""
    return sum(one.tokens for one in played) / sum(times.seconds(one, beyond) for one in played)


def rows_of(runs: Sequence[Run], texts: Sequence[TracedText]) -> list[dict[str, Any]]:
    """A line for each contestant."""
    times = ForwardTimes.of([one for run in runs for one in run.rounds])
    found = []
    for run in runs:
        played, beyond = run.played(texts), overhead(run.rounds)
        said, whole = predicted(played, times, beyond), sum(one.seconds for one in run.rounds)
        hits, rejections = run.hits
        found.append({
            "name": run.contender.name, "measured": run.speed, "predicted": said, "difference": said / run.speed - 1,
            "apart": predicted(played, times.apart(), beyond),
            "apart_free": predicted(played, times.apart(free_rows=True), beyond),
            "hits": hits / rejections if hits else 0.0,
            "hits_predicted": sum(r.hit for r in played) / max(1, sum(r.rejected for r in played)),
            "shares": {part: seconds / whole for part, seconds in run.parts.items()},
        })  # fmt: skip
    return found


def measure(llm: LLM, contenders: Sequence[Contender], prompts: Sequence[str], tokens: int, repeats: int) -> list[Run]:
    """In turns on each prompt, after one that is not counted."""
    runs = [Run(contender) for contender in contenders]
    variants = []
    for run in runs:
        options = {"prepared_windows": 0, **run.contender.options}
        if options["prepared_windows"] == "auto":
            options["prepared_windows"] = 0
        variants.append(llm.variant(observer=run.add, **options))
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    for variant in variants:
        answered(variant.generate(prompts[0], params))
    for run in runs:
        run.rounds.clear()
        run.parts.update(dict.fromkeys(run.parts, 0.0))
    for _ in range(repeats):
        for prompt in prompts:
            for variant in variants:
                answered(variant.generate(prompt, params))
    for variant in variants:
        variant.close()
    return runs


def traced(llm: LLM, prompts: Sequence[str], tokens: int) -> list[TracedText]:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    with llm.variant(method="autoregressive") as plain:
        outputs = answered(plain.generate(list(prompts), params))
    return [trace(llm, output.prompt_token_ids, output.outputs[0].token_ids) for output in outputs]


def table(found: Sequence[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    for row in found:
        hits = f"{row['hits']:.0%} ({row['hits_predicted']:.0%})" if row["hits"] else "-"
        shares = [f"{row['shares'][part]:.0%}" for part in ("draft", "both", "target", "host")]
        speeds = [f"{row[name]:.0f}" for name in ("measured", "predicted")]
        cells = [
            row["name"],
            *speeds,
            f"{row['difference']:+.1%}",
            f"{row['apart']:.0f}",
            f"{row['apart_free']:.0f}",
            hits,
            *shares,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def prepared_gain(
    dataset: Annotated[str, typer.Option(help="builtin, humaneval, ..., or a JSONL file")] = BUILT_IN,
    prompts: Annotated[int, typer.Option(min=2)] = 8,
    max_tokens: Annotated[int, typer.Option(min=8)] = 96,
    repeats: Annotated[int, typer.Option(min=1)] = 2,
    methods: Annotated[str, typer.Option(help="Autoregressive, and methods with fixed windows")] = DEFAULT,
    target: Annotated[str | None, typer.Option(help="Path or hub id; default: the bundled pair")] = None,
    draft: Annotated[str | None, typer.Option(help="Path or hub id")] = None,
    json_out: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Measure one greedy request at a time, and predict the same from token ranks and forwards' times."""
    check_output("--json", json_out)
    contenders = parse_contenders(methods)
    for one in contenders:
        if one.method != "autoregressive" and not isinstance(one.window, int):
            raise ConfigurationError(f"--methods: {one.name} has no fixed window, so its rounds cannot be played again")
    texts = load_prompts(dataset, prompts)
    options: dict[str, Any] = {
        "target": target,
        "draft": draft,
        "prefix_caching": False,
        "max_num_seqs": 1,
        "capture_seconds": 0,
    }
    with LLM(**options) as llm:
        ranks = traced(llm, texts, max_tokens)
        runs = measure(llm, contenders, texts, max_tokens, repeats)
    found, times = rows_of(runs, ranks), ForwardTimes.of([one for run in runs for one in run.rounds])
    typer.echo(f"acceptance {statistics.fmean(text.acceptance for text in ranks):.2f} of {len(ranks)} outputs")
    for name, curves in (("target", times.target), ("draft step", times.draft)):
        for beside, curve in curves.items():
            points = ", ".join(f"{n:.0f}: {1e3 * s:.2f}" for n, s in zip(curve.rows, curve.seconds, strict=True))
            typer.echo(f"{name} {'beside' if beside else 'alone'}, ms by rows: {points}")
    typer.echo(table(found))
    if json_out is not None:
        write_whole(json_out, json.dumps({**provenance(), "rows": found}, indent=1) + "\n")


def main() -> None:
    run_command(prepared_gain)

"""Greedy outputs of every device, dtype and method against CPU fp32: equal, or different only where rounding decides.

Two forwards of different shapes, kernels or dtypes round differently, so that two nearly equal logits can fall either
way. Such a *tie* is told from a bug by the log-probabilities of both runs at the first position where they differ: each
run must hold its own token and the other's for equal up to TIES of the dtype.

    python bench/greedy_agreement.py --device cuda --json greedy.json
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from pearl.bench.command import run_command
from pearl.bench.options import check_output
from pearl.bench.prompt_sets import BUILT_IN, load_prompts
from pearl.bench.report import provenance, write_whole
from pearl.errors import PearlError
from pearl.llm import LLM
from pearl.messages import TokenLogprobs
from pearl.outputs import CompletionOutput
from pearl.sampling_params import SamplingParams

METHODS: dict[str, dict[str, Any]] = {
    "autoregressive": {"method": "autoregressive"},
    "speculative": {"method": "speculative"},
    "pearl": {"method": "pearl"},
    "pearl@5+6": {"method": "pearl", "window": 5, "prepared_windows": 6},  # branches in every round
}
BASELINE = "autoregressive"
# Largest gap of two log-probabilities that rounding may close. bf16: one unit in the last place of a logit of 16 to 32,
# which the hidden states' rounding does not exceed by much; fp32: some hundred, because sums come in another order.
TIES = {"float32": 1e-3, "bfloat16": 0.125}
ALTERNATIVES = 5  # log-probabilities asked for: a tie may be of more than two tokens


@dataclass(frozen=True)
class Run:
    """Outputs of one way to compute them. ``name`` is as "cuda bfloat16 pearl"."""

    name: str
    dtype: str
    outputs: Sequence[CompletionOutput]


@dataclass(frozen=True)
class Difference:
    """The first one of a prompt. Gaps: of each run's log-probabilities, its own token's over the other's; None if the
    other's is not among the most likely ones. An output that ended has the token None."""

    prompt: int
    position: int
    expected_token: int | None
    token: int | None
    expected_gap: float | None
    gap: float | None
    tie: bool


@dataclass(frozen=True)
class Comparison:
    """``drift``: the largest difference of a chosen token's log-probability before the outputs part."""

    expected: str
    run: str
    threshold: float
    prompts: int
    tokens: int
    drift: float
    differences: tuple[Difference, ...]

    @property
    def agrees(self) -> bool:
        return all(difference.tie for difference in self.differences)


@dataclass
class Report:
    settings: dict[str, Any]
    comparisons: list[Comparison] = field(default_factory=list)
    complete: bool = False

    def write(self, path: Path) -> None:
        content = {
            **provenance(),
            "settings": self.settings,
            "ties": TIES,
            "complete": self.complete,
            "agrees": all(c.agrees for c in self.comparisons),
            "comparisons": [{**asdict(c), "agrees": c.agrees} for c in self.comparisons],
        }
        write_whole(path, json.dumps(content, indent=2) + "\n")


def first_difference(
    prompt: int, expected: CompletionOutput, output: CompletionOutput, threshold: float
) -> Difference | None:
    """None if the tokens are the same. An output that ended early has no token to be a tie with."""
    mine, theirs = output.token_ids, expected.token_ids
    if mine == theirs:
        return None
    shared = shared_prefix(theirs, mine)
    if shared == min(len(mine), len(theirs)):
        expected_token, token = (tokens[shared] if shared < len(tokens) else None for tokens in (theirs, mine))
        return Difference(prompt, shared, expected_token, token, None, None, False)
    expected_gap = _gap(_logprobs(expected)[shared], mine[shared])
    gap = _gap(_logprobs(output)[shared], theirs[shared])
    tie = all(g is not None and g <= threshold for g in (expected_gap, gap))
    return Difference(prompt, shared, theirs[shared], mine[shared], expected_gap, gap, tie)


def shared_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))


def _gap(chosen: TokenLogprobs, other: int) -> float | None:
    found = dict(chosen.top).get(other)
    return None if found is None else chosen.logprob - found


def _logprobs(output: CompletionOutput) -> list[TokenLogprobs]:
    if output.logprobs is None:
        raise ValueError("the outputs were generated without log-probabilities")
    return output.logprobs


def compare(expected: Run, run: Run) -> Comparison:
    threshold = max(TIES[expected.dtype], TIES[run.dtype])
    differences, drift, tokens = [], 0.0, 0
    for index, (theirs, mine) in enumerate(zip(expected.outputs, run.outputs, strict=True)):
        if mine.error or theirs.error:
            raise PearlError(f"{run.name}: prompt {index} was given up: {mine.error or theirs.error}")
        shared = shared_prefix(theirs.token_ids, mine.token_ids)
        pairs = zip(_logprobs(theirs)[:shared], _logprobs(mine)[:shared], strict=True)
        drift = max([drift, *(abs(a.logprob - b.logprob) for a, b in pairs)])
        tokens += len(mine.token_ids)
        if (difference := first_difference(index, theirs, mine, threshold)) is not None:
            differences.append(difference)
    return Comparison(expected.name, run.name, threshold, len(run.outputs), tokens, drift, tuple(differences))


def generate(device: str, dtype: str, methods: Sequence[str], prompts: Sequence[str], max_tokens: int) -> list[Run]:
    """A run of each method, on one pair of models."""
    params = SamplingParams(max_tokens=max_tokens, logprobs=ALTERNATIVES, ignore_eos=True)
    runs = []
    with LLM(device=device, dtype=dtype, prefix_caching=False, max_num_seqs=len(prompts)) as first:
        for method in methods:
            with first.variant(**METHODS[method]) as llm:
                outputs = [output.outputs[0] for output in llm.generate(list(prompts), params)]
            runs.append(Run(f"{device} {dtype} {method}", dtype, outputs))
    return runs


def describe(c: Comparison) -> list[str]:
    """A line for people, and one for each difference."""
    same = c.prompts - len(c.differences)
    lines = [f"{c.run} against {c.expected}: {same} of {c.prompts} equal, log-probabilities within {c.drift:.2g}"]
    for d in c.differences:
        gaps = ", ".join("none" if gap is None else f"{gap:.3g}" for gap in (d.expected_gap, d.gap))
        verdict = f"a tie (up to {c.threshold:g})" if d.tie else "NO TIE"
        where = f"prompt {d.prompt}, token {d.position}"
        lines.append(f"  {where}: {d.expected_token} or {d.token}, gaps {gaps}: {verdict}")
    return lines


def greedy_agreement(
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    prompts: Annotated[int, typer.Option(min=1, help="How many of the built-in prompts")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest output")] = 64,
    json_out: Annotated[Path | None, typer.Option("--json", help="Rewritten after every comparison")] = None,
) -> None:
    """Compare greedy outputs of the bundled pair with CPU fp32, and the methods with each other.

    Exit status 1: an output differs where it is no tie.
    """
    check_output("--json", json_out)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = load_prompts(BUILT_IN, prompts)
    report = Report({"device": device, "prompts": len(texts), "max_tokens": max_tokens})
    (truth,) = generate("cpu", "float32", [BASELINE], texts, max_tokens)
    for dtype in TIES:
        runs = generate(device, dtype, list(METHODS), texts, max_tokens)
        beside_truth = [] if runs[0].name == truth.name else [(truth, run) for run in runs]
        for expected, run in (*beside_truth, *((runs[0], run) for run in runs[1:])):
            comparison = compare(expected, run)
            report.comparisons.append(comparison)
            typer.echo("\n".join(describe(comparison)))
        report.complete = dtype == list(TIES)[-1]
        if json_out is not None:
            report.write(json_out)
    if not all(c.agrees for c in report.comparisons):
        raise typer.Exit(1)


def main() -> None:
    run_command(greedy_agreement)


if __name__ == "__main__":
    main()

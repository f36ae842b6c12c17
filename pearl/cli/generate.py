"""``pearl generate``: complete one prompt."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pearl.cli.exits import FAILED
from pearl.cli.grouping import spread
from pearl.cli.options import EngineOptions, OutputOptions, SamplingOptions
from pearl.cli.streams import require_output
from pearl.cli.terminal import Terminal
from pearl.cli.text_input import checked_text, read_text
from pearl.errors import InvalidRequestError
from pearl.interrupts import INTERRUPTED

if TYPE_CHECKING:
    from pearl.cli.answer import Answer
    from pearl.outputs import CompletionOutput, RequestMetrics

_MOST_AT_ONCE = 16


@spread
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue; '-' or nothing reads it from standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    n: Annotated[int, typer.Option("-n", help="Outputs for the prompt; output i uses seed + i.")] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: text, token_ids, finish_reason, metrics.")
    ] = False,
    *,
    engine: EngineOptions,
    sampling: SamplingOptions,
    output: OutputOptions,
) -> None:
    """Complete a prompt.

    Text goes to standard output as it is generated, and nothing else does; what it cost goes to standard error.
    On a terminal, tokens that the draft model proposed and the target confirmed differ in colour from the target's own.
    """
    params = sampling.params(n)
    text = read_prompt(prompt, file)
    terminal = Terminal.open(output.no_color)
    require_output()
    from pearl.cli.answer import Display, TextDisplay, generate_answer
    from pearl.cli.loading import loaded

    with loaded(engine, terminal, max_num_seqs=min(n, _MOST_AT_ONCE)) as llm:
        ids = llm.encode(text)
        display = Display() if as_json else TextDisplay(terminal, llm, ids, n)
        answer = generate_answer(llm, ids, params, display)
    if as_json:
        terminal.write(json.dumps(as_object(answer)) + "\n")
    else:
        terminal.note(answer.closing_line(engine.method))
        terminal.legend()
    if answer.interrupted:
        raise typer.Exit(INTERRUPTED)
    if terminal.escaped:
        raise typer.Exit(FAILED)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, a file or standard input.

    A newline at the very end of a file or of standard input ends its last line, it is not part of the prompt.
    Raises InvalidRequestError if there is no prompt, or more than one.
    """
    if file is not None and prompt is not None:
        raise InvalidRequestError("give the prompt as an argument or with --file, not both")
    if file is None and prompt is None and (sys.stdin is None or sys.stdin.isatty()):
        raise InvalidRequestError('no prompt; write pearl generate "PROMPT", name a --file or pipe the text in')
    given = None if prompt is None or prompt == "-" else prompt
    text = read_text(file).removesuffix("\n") if given is None else checked_text(given, "the prompt")
    if not text:
        raise InvalidRequestError("the prompt is empty; give at least one character")
    return text


def as_object(answer: Answer) -> dict[str, Any]:
    """What ``--json`` prints: the first output, and with n > 1 the list of all as ``outputs``."""
    objects = [_output_object(output) for output in answer.outputs]
    return objects[0] if len(objects) == 1 else objects[0] | {"outputs": objects}


def _output_object(output: CompletionOutput) -> dict[str, Any]:
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "drafted": output.drafted,
        "finish_reason": output.finish_reason or "abort",
        "metrics": _metrics_object(output.metrics),
    }


def _metrics_object(metrics: RequestMetrics) -> dict[str, Any]:
    """Counters and what follows from them; instants of a private clock mean nothing to a reader."""
    counters = asdict(metrics)
    for instant in ("arrival", "first_token_at", "finished_at"):
        del counters[instant]
    return counters | {
        "acceptance_rate": metrics.acceptance_rate,
        "mean_accepted_tokens": metrics.mean_accepted_tokens,
        "time_to_first_token": metrics.time_to_first_token,
        "latency": metrics.latency,
    }

"""``python bench/suite.py``: the paper's experiments on one pair of models, a study each, and their report.

A folder holds everything of a pair: STUDY.jsonl is what was measured, from which a killed run goes on; STUDY.json and
STUDY.csv are its summary; report.html and report.md show all studies that are there.
"""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pearl.bench.command import run_command
from pearl.bench.options import check_output, positive_numbers
from pearl.errors import ConfigurationError
from pearl.user_values import shown

_REPORT = "report"
_STUDIES = ("methods", "windows", "ablation", "batches", "temperatures", "anatomy", "turns")
_AGREEMENT = "agreement"
_SETS = ("humaneval", "gsm8k", "mt_bench", "mgsm")

_Data = Annotated[Path | None, typer.Option(help="Folder with humaneval.jsonl, ...; else $PEARL_DATA, the hub")]
_OtherDrafts = Annotated[
    list[str] | None,
    typer.Option("--other-draft", help="Of methods: compared too, at the pace's windows"),
]
_CheckAnswers = Annotated[bool, typer.Option("--check-answers", help="Mark the answers: pass@1, exact match")]


def suite(
    study: Annotated[str, typer.Argument(help=f"{', '.join(_STUDIES)}, {_AGREEMENT}, or {_REPORT}")] = "methods",
    out: Annotated[Path, typer.Option(help="Folder; a run that was killed goes on in it")] = Path("suite"),
    target: Annotated[str | None, typer.Option(help="Path or hub id; default: the bundled pair")] = None,
    draft: Annotated[str | None, typer.Option(help='Path or hub id, or "ngram"')] = None,
    other_drafts: _OtherDrafts = None,
    data: _Data = None,
    data_sets: Annotated[str, typer.Option(help=f"Of {', '.join(_SETS)}")] = ",".join(_SETS),
    questions: Annotated[int, typer.Option(min=1, help="Of each data set; of MGSM, languages in turn")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Longest answer")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Answers of each setup to each question")] = 2,
    setups: Annotated[str | None, typer.Option(help="Of methods: only these, comma-separated")] = None,
    windows: Annotated[str, typer.Option(help="Fixed windows to try, comma-separated")] = "1,2,3,4,5,6,8,10,12,16",
    search_questions: Annotated[int, typer.Option(min=1, help="Of each data set, to find the best windows")] = 2,
    batches: Annotated[str, typer.Option(help="Requests at once, of the study")] = "1,2,4,8,16,32",
    temperatures: Annotated[str, typer.Option(help="Of the study")] = "0,0.25,0.5,0.75,1,1.25,1.5",
    plain_prompts: Annotated[bool, typer.Option("--plain", help="No chat template, though there is one")] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at end of text")] = False,
    check_answers: _CheckAnswers = False,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda")] = "auto",
    draft_device: Annotated[str | None, typer.Option(help="The draft's, where it differs")] = None,
    target_device: Annotated[str | None, typer.Option(help="The target's, where it differs")] = None,
    target_parallel: Annotated[int, typer.Option(min=1, help="GPUs that share the target")] = 1,
    dtype: Annotated[str, typer.Option(help="auto | float32 | bfloat16 | float16")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Positions of a conversation")] = None,
) -> None:
    """Measure a study, or go on with one, and write the report of all that are in the folder: report does only that.

    agreement: whether what engines draft, or compute in batches, is what they decode plainly.
    """
    _check_study(study, setups)
    names = _names("--data-sets", data_sets, _SETS)
    asked: dict[str, Any] = {
        "target": target, "draft": draft, "other_drafts": other_drafts or [],
        "data_sets": names, "questions": questions, "max_tokens": max_tokens,
        "repeats": repeats, "setups": None if setups is None else _list(setups),
        "windows": positive_numbers("--windows", windows), "search_questions": search_questions,
        "batches": positive_numbers("--batches", batches), "temperatures": _temperatures(temperatures),
        "plain": plain_prompts, "ignore_eos": ignore_eos, "check_answers": check_answers,
    }  # fmt: skip
    options: dict[str, Any] = {
        "target": target, "draft": draft, "device": device, "draft_device": draft_device, "dtype": dtype,
        "target_device": target_device, "target_parallel": target_parallel, "max_model_len": max_model_len,
    }  # fmt: skip
    if data is not None and not data.is_dir():
        raise ConfigurationError(f"--data: {data} is no folder; it is to hold humaneval.jsonl, ...")
    check_output("--out", out / "x" if out.exists() else out)
    _measure(study, out, asked, options, data)


def _check_study(study: str, setups: str | None) -> None:
    if study not in (*_STUDIES, _AGREEMENT, _REPORT):
        known = ", ".join((*_STUDIES, _AGREEMENT))
        raise ConfigurationError(f"{shown(study)} is no study; there are {known}, and {_REPORT}")
    if setups is not None and study != "methods":
        raise ConfigurationError("--setups is for the study of methods; the others have their own")


def _measure(study: str, out: Path, asked: dict[str, Any], options: dict[str, Any], data: Path | None) -> None:
    # What follows needs torch, for which --help and the refusals before do not wait.
    from rich.console import Console

    from bench.evaluation.measuring import measure, measure_agreement
    from bench.evaluation.report import write_report

    console, command = Console(), shlex.join(["python", "bench/suite.py", *sys.argv[1:]])
    if study != _REPORT:
        out.mkdir(exist_ok=True)
        work = measure_agreement if study == _AGREEMENT else partial(measure, study)
        work(out, asked, options, data, console, command)
    for path in write_report(out):
        console.print(f"written to {path}")


def _list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _names(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    names = _list(text)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigurationError(f"{option} takes {', '.join(known)}, not {shown(unknown[0] if unknown else text)}")
    return list(dict.fromkeys(names))


def _temperatures(text: str) -> list[float]:
    found = [_number(name) for name in _list(text)]
    if not found or any(value is None or not 0 <= value <= 10 for value in found):
        raise ConfigurationError(f"--temperatures takes numbers from 0 to 10, separated by commas, not {shown(text)}")
    return [*dict.fromkeys(value for value in found if value is not None)]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def main() -> None:
    run_command(suite)

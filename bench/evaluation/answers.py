"""Marks answers: HumanEval by its tests, GSM8K and MGSM by the number. That all methods score the same is what
"lossless" means to somebody who reads answers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console
from rich.progress import track

from bench.evaluation.data_sets import Question
from bench.evaluation.records import Record
from bench.evaluation.sandbox import passes
from pearl.models import Tokenizer

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_ENDS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```")  # of a function's body, in the reference work
_BLOCK = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)
_TRIGGER = "the answer is"


def mark(
    records: Sequence[Record], questions: Mapping[str, Question], tokenizer: Tokenizer, console: Console
) -> dict[tuple[str, int, str], bool]:
    """By question, turn and setup, of first answers to questions that have a right one. Equal texts are marked once."""
    known: dict[tuple[str, str], bool] = {}
    found: dict[tuple[str, int, str], bool] = {}
    for record in track(records, "answers", console=console, disable=not console.is_terminal):
        for key, output in zip(record.questions, record.outputs, strict=True):
            question = questions.get(key)
            if record.repeat or record.turn or question is None or not question.answer:
                continue
            text = tokenizer.decode(output)
            if (key, text) not in known:
                known[key, text] = is_right(question, text)
            found[key, record.turn, record.setup] = known[key, text]
    return found


def is_right(question: Question, text: str) -> bool:
    if "number" in question.answer:
        said = number_in(text)
        return said is not None and _value(said) == _value(question.answer["number"])
    program = f"{program_of(question, text)}\n\n{question.answer['test']}\n\ncheck({question.answer['entry_point']})\n"
    return passes(program)


def number_in(text: str) -> str | None:
    """What follows the first "the answer is", as worked examples end, else the last number; behind it a further
    question of the model's own making does not count.
    """
    own, _, _ = text.partition("\nQ:")
    before, trigger, behind = own.lower().partition(_TRIGGER)
    numbers = _NUMBER.findall(behind if trigger else before)
    return (numbers[0] if trigger else numbers[-1]) if numbers else None


def _value(number: str) -> float | None:
    try:
        return float(number.replace(",", ""))
    except ValueError:
        return None


def program_of(question: Question, text: str) -> str:
    """The function, as a chat model writes it between back quotes, or as the prompt goes on."""
    prompt, name = question.answer["prompt"], question.answer["entry_point"]
    blocks: Iterable[str] = _BLOCK.findall(text)
    for block in blocks:
        if f"def {name}" in block:
            return f"{_imports(prompt)}\n{block}"
    body = text
    for end in _ENDS:
        body = body.partition(end)[0]
    # The prompt was asked without its last line break, behind which the body is indented.
    return prompt.rstrip() + (body if body.startswith("\n") else "\n    " + body.lstrip())


def _imports(prompt: str) -> str:
    return "\n".join(line for line in prompt.split("\n") if line.startswith(("import ", "from ")))

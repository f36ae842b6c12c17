"""The paper's four data sets, as questions: their texts in the reference work's form, and what a right answer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from pearl.bench.prompt_sets import load_rows, text_of
from pearl.errors import ConfigurationError
from pearl.user_values import shown

_EXAMPLES = 8  # worked ones before each question of GSM8K
_EXAMPLES_FILE = "gsm8k_examples"


@dataclass(frozen=True)
class Question:
    """``turns``: what the user says, one after another; more than one are a conversation. ``examples``: worked ones
    that stand before the first turn, as many as fit. ``group``: a part of the set that is reported apart. ``answer``:
    what ``bench.evaluation.answers`` needs to mark one.
    """

    data_set: str
    id: str
    turns: tuple[str, ...]
    examples: tuple[str, ...] = ()
    group: str | None = None
    answer: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.data_set}/{self.id}"


def load_questions(name: str, count: int, folder: Path | None = None) -> list[Question]:
    """The first ``count`` of a set of DATA_SETS, from ``folder`` / NAME.jsonl ($PEARL_DATA if None) or the hub. Sets
    with groups give their questions in turn: every group's first, then every group's second. ConfigurationError.
    """
    rows = load_rows(name, None if folder is None else str(folder))
    questions = DATA_SETS[name](rows, folder)
    if any(question.group for question in questions):
        groups: dict[str | None, list[Question]] = {}
        for question in questions:
            groups.setdefault(question.group, []).append(question)
        questions = [q for q in chain.from_iterable(zip_longest(*groups.values())) if q is not None]
    return questions[:count]


_Rows = Sequence[tuple[str, Any]]


def _text(row: Any, key: str, source: str) -> str:
    if not isinstance(row, Mapping) or row.get(key) is None:
        raise ConfigurationError(f"{source} has no {key!r}")
    return text_of(row[key], f"{source}: {key}")


def _humaneval(rows: _Rows, folder: Path | None) -> list[Question]:
    """The prompt alone, without white space around it."""
    questions = []
    for source, row in rows:
        prompt = _text(row, "prompt", source)
        answer = {key: _text(row, key, source) for key in ("prompt", "test", "entry_point") if key in row}
        questions.append(Question("humaneval", _text(row, "task_id", source), (prompt.strip(),), answer=answer))
    return questions


def _gsm8k(rows: _Rows, folder: Path | None) -> list[Question]:
    """Eight worked examples, then the question. The reference work takes those of Wei et al. (2022); here they are
    those of gsm8k_examples.jsonl in the folder, or else the set's last eight, which are asked nobody.
    """
    given = folder is not None and (folder / f"{_EXAMPLES_FILE}.jsonl").is_file()
    own = load_rows(str(folder / f"{_EXAMPLES_FILE}.jsonl")) if given and folder is not None else rows[-_EXAMPLES:]
    examples = tuple(_worked(row, source) for source, row in own)
    return [
        Question(
            "gsm8k", str(number), (f"Q: {_text(row, 'question', source)}\nA:",), examples,
            answer={"number": gsm8k_answer(_text(row, "answer", source))},
        )
        for number, (source, row) in enumerate(rows if given else rows[:-_EXAMPLES])
    ]  # fmt: skip


def gsm8k_answer(worked: str) -> str:
    """The number behind the ####."""
    return worked.rpartition("####")[2].strip().replace(",", "")


def _worked(row: Any, source: str) -> str:
    """In the form of the examples of Wei et al.: a chain of sentences, then the answer."""
    answer = _text(row, "answer", source)
    chain_, _, _ = answer.rpartition("####")
    steps = " ".join(_without_marks(chain_).split())
    return f"Q: {_text(row, 'question', source)}\nA: {steps} The answer is {gsm8k_answer(answer)}.\n\n"


def _without_marks(text: str) -> str:
    """GSM8K writes <<16-3=13>> for a calculator, in front of what it says anyway."""
    before, mark, rest = text.partition("<<")
    return before if not mark else before + _without_marks(rest.partition(">>")[2])


def _mt_bench(rows: _Rows, folder: Path | None) -> list[Question]:
    questions: list[Question] = []
    for source, row in rows:
        key = "turns" if isinstance(row, Mapping) and "turns" in row else "prompt"  # the hub's name of it
        turns = row.get(key) if isinstance(row, Mapping) else None
        if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
            raise ConfigurationError(f"{source} has no list of turns, but {shown(turns)}")
        texts = tuple(text_of(turn, f"{source}: {key}") for turn in turns)
        name = row.get("question_id", row.get("prompt_id", len(questions)))
        questions.append(Question("mt_bench", str(name), texts, group=_text(row, "category", source)))
    return questions


def _mgsm(rows: _Rows, folder: Path | None) -> list[Question]:
    questions: list[Question] = []
    for source, row in rows:
        language, text = _text(row, "category", source), _text(row, "question", source)
        number = row.get("answer_number", row.get("answer"))
        answer = {} if number is None else {"number": str(number).replace(",", "")}
        name = f"{language} {sum(q.group == language for q in questions)}"
        questions.append(Question("mgsm", name, (f"Question: {text}\n\nAnswer:",), group=language, answer=answer))
    return questions


DATA_SETS: Mapping[str, Callable[[_Rows, Path | None], list[Question]]] = {
    "humaneval": _humaneval,
    "gsm8k": _gsm8k,
    "mt_bench": _mt_bench,
    "mgsm": _mgsm,
}

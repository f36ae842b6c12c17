"""The suite's parts: questions, marks, what rounds are made of, predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_support import hand_made_round
from evaluation_support import write_sets

from bench.evaluation.anatomy import Anatomy
from bench.evaluation.answers import is_right, number_in, program_of
from bench.evaluation.conversations import Conversations, TooLongError
from bench.evaluation.data_sets import Question, load_questions
from bench.evaluation.prediction import Forwards, odds_of, predicted
from bench.evaluation.records import Record
from bench.evaluation.sandbox import passes
from bench.evaluation.setups import fixed, plain
from bench.evaluation.summary import ALL, rows
from pearl.errors import ConfigurationError
from pearl.messages import Busy


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("data"))


def test_questions_have_the_reference_works_form(data: Path) -> None:
    code, _ = load_questions("humaneval", 9, data)
    assert code.turns == ("def add(a, b):\n    return a",)
    school = load_questions("gsm8k", 9, data)
    assert [q.turns[0] for q in school] == [f"Q: How much is {i} and {i}?\nA:" for i in range(3)], "8 are examples"
    assert school[0].examples[0] == "Q: How much is 3 and 3?\nA: It is 3+3=6. The answer is 6.\n\n"
    assert school[1].answer == {"number": "2"}
    (talk,) = load_questions("mt_bench", 9, data)
    assert (len(talk.turns), talk.group) == (2, "coding")
    languages = load_questions("mgsm", 3, data)
    assert [q.group for q in languages] == ["german", "thai", "german"], "in turn"
    assert languages[0].turns == ("Question: german 0\n\nAnswer:",)


def test_examples_of_ones_own(data: Path, tmp_path: Path) -> None:
    write_sets(tmp_path)
    (tmp_path / "gsm8k_examples.jsonl").write_text('{"question": "Why?", "answer": "So. #### 1,000"}\n')
    found = load_questions("gsm8k", 99, tmp_path)
    assert len(found) == 11
    assert found[0].examples == ("Q: Why?\nA: So. The answer is 1000.\n\n",)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("humaneval", {"task_id": "x"}, "line 1 has no 'prompt'"),
        ("mt_bench", {"turns": "one", "category": "a"}, "line 1 has no list of turns, but 'one'"),
        ("mgsm", {"question": "x"}, "line 1 has no 'category'"),
        ("humaneval", {"task_id": "x", "prompt": 3}, "line 1: prompt is int, not text"),
    ],
)
def test_rows_that_are_no_questions(tmp_path: Path, name: str, row: Any, message: str) -> None:
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigurationError, match=message):
        load_questions(name, 1, tmp_path)


class FakeTokenizer:
    eos_ids = frozenset({0})

    def encode(self, text: str) -> list[int]:
        return [*map(ord, text)]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def render_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return self.encode("|".join(f"{m['role'][0]}:{m['content']}" for m in messages))


class FakeLLM:
    tokenizer, max_model_len = FakeTokenizer(), 41


def test_conversations() -> None:
    plain_text, chat = (Conversations(FakeLLM(), use, 10) for use in (False, True))  # type: ignore[arg-type]
    question = Question("mt_bench", "1", ("one", "two"))
    assert chat.ids(question, 1, [[65, 66, 0]]) == FakeTokenizer().encode("u:one|a:AB|u:two")
    assert plain_text.ids(question, 1, [[65, 66, 0]]) == FakeTokenizer().encode("one\n\nAB\n\ntwo\n\n")
    assert plain_text.ids(question, 0, []) == FakeTokenizer().encode("one\n\n")
    shots = Question("gsm8k", "1", ("Q",), ("a" * 20, "b" * 15, "c" * 5))
    assert plain_text.ids(shots, 0, []) == FakeTokenizer().encode("b" * 15 + "c" * 5 + "Q"), "the last ones that fit"
    with pytest.raises(TooLongError, match="mt_bench/1 takes 32 tokens; with an answer there is room for 30"):
        chat.ids(Question("mt_bench", "1", ("x" * 30,)), 0, [])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 3. The answer is 1,234.\n\nQ: Next? The answer is 9.", "1,234"),
        ("so 5 and then 7.50 dollars", "7.50"),
        ("It is 5.\n\nQ: Next?\nA: 7. The answer is 9.", "5"),
        ("nothing", None),
        ("-3", "-3"),
    ],
)
def test_numbers_in_answers(text: str, number: str | None) -> None:
    assert number_in(text) == number


CODE = Question(
    "humaneval", "0", (), answer={"prompt": "import math\n\ndef two():\n", "entry_point": "two",
                                  "test": "def check(f):\n    assert f() == math.sqrt(4)"},
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("\n    return 2\n\ndef other(:", True),
        ("    return 2", True),
        ("\n    return 3", False),
        ("Sure:\n```python\ndef two():\n    return 2\n```\nas asked", True),
        ("\n    return (", False),
        ("\n    import sys\n    sys.exit(0)", False),
    ],
)
def test_functions_are_run(text: str, right: bool) -> None:
    assert is_right(CODE, text) is right, program_of(CODE, text)


def test_numbers_are_compared_as_numbers() -> None:
    question = Question("mgsm", "0", (), answer={"number": "18"})
    assert is_right(question, "Antwort: 18.00")
    assert not is_right(question, "18, no: 19")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import mmap; mmap.mmap(-1, 1 << 31)",
        "open('f', 'wb').write(bytes(1 << 22))",
        "import os; os.fork()",
        "import os; os._exit(0)",
        "import os; print('PASSED', flush=True); os._exit(0)",
        "input()",
    ],
)
def test_programs_that_misbehave_fail(program: str) -> None:
    assert not passes(program, seconds=1)


def test_a_program_that_ends_passes() -> None:
    assert passes("print('x')\nimport typing")


def test_what_rounds_are_made_of() -> None:
    rounds = [
        hand_made_round(0, whole=Busy(0, 5), draft=Busy(0, 2), drafted=2),
        hand_made_round(1, whole=Busy(5, 6), target=Busy(5, 4), accepted=2),
        hand_made_round(2, whole=Busy(11, 6), target=Busy(11, 3), draft=Busy(12, 4), drafted=2, own=True),
    ]
    verdicts = {id(r.result): Busy(end, 0.5) for r, end in zip(rounds, (2, 9, 16), strict=True)}
    found = Anatomy.of(rounds, verdicts)
    assert dict(found.seconds) == {
        "whole": 17, "target": 7, "draft": 6, "verify": 1.5, "host": 17 - (2 + 4 + 5) - 1.5, "target_idle": 10,
        "draft_idle": 11,
    }  # fmt: skip
    assert dict(found.target_rows) == {"alone 1": [4], "beside 1": [3]}
    assert found.overheads == [3, 2, 2]
    assert found.positions == [[2, 1], [1, 1]]
    assert (found.first, found.later) == ([1, 1], [2, 1]), "the third verdict follows accepted tokens"
    again = Anatomy.together([json.loads(json.dumps(found.as_json()))] * 2)
    assert again.positions == [[4, 2], [2, 2]]
    assert again.seconds["host"] == 2 * found.seconds["host"]
    assert again.target_rows["alone 1"] == [4, 4]
    assert again.acceptance == pytest.approx(2 / 3)


def anatomy(**given: Any) -> dict[str, Any]:
    return {**Anatomy().as_json(), "rounds": 1, **given}


def test_predictions_are_the_formulas() -> None:
    forwards_ = {"alone 1": [9, 4.0], "alone 4": [9, 7.0], "beside 9": [9, 9.0]}
    times = {"target_rows": forwards_, "draft_steps": {"alone": [9, 0.5]}}
    together = Anatomy.together([anatomy(**times, first=[10, 8], later=[10, 5], overhead=[2, 1.0])])
    forwards, odds = Forwards.measured(together), odds_of(together)
    assert forwards is not None
    assert predicted(plain().options, forwards, None, together) == pytest.approx(1 / (4 + 1))
    # Three drafted tokens: 1 + .8 + .8 * .5 + .8 * .25 tokens in two rounds, of 1.5 and 7 seconds.
    rate = predicted(fixed("speculative", 3).options, forwards, odds, together)
    assert rate == pytest.approx((1 + 0.8 + 0.4 + 0.2) / (1.5 + 7 + 2))
    assert predicted({"method": "pearl"}, forwards, odds, together) is None, "the pace's windows are not known"
    assert predicted({"method": "pearl", "window": 3, "draft": "ngram"}, forwards, odds, together) is None


def record(setup: str, question: str, repeat: int, seconds: float, first: float | None = 1.0, turn: int = 0) -> Record:
    about = ("gsm8k", [question], [None], turn, setup, "autoregressive", 1, 0.0, True, repeat, None)
    return Record(*about, [[7] * 11], seconds, first, None)


def test_speedups_are_of_neighbours() -> None:
    records = [
        record("autoregressive", "a", 0, 11), record("pearl", "a", 0, 6),
        record("autoregressive", "a", 1, 41), record("pearl", "a", 1, 21),
        record("autoregressive", "b", 0, 5), record("pearl", "b", 0, 5, None),
    ]  # fmt: skip
    base, pearl = rows(records, [], {("a", 0, "pearl"): True, ("b", 0, "pearl"): False})
    assert (base.part, base.answers, base.repeats, base.tokens) == (ALL, 2, 2, 22)
    assert base.tok_s == 22 / (26 + 5), "of medians"
    assert pearl.speedup == pytest.approx(11 / 6), "the median of 11/6, 41/21 and 1"
    assert pearl.decode_speedup == pytest.approx(2), "of those that tell; without the time to the first token"
    assert pearl.decode_tok_s == 10 / 12.5
    assert pearl.speedup_low is not None
    assert pearl.speedup_low < pearl.speedup
    assert (base.score, pearl.score) == (None, 0.5)

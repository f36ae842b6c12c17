"""A study's records as numbers: a row for each data set, part of one, and setup; JSON and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from bench.evaluation.anatomy import Anatomy
from bench.evaluation.differences import Compared, Difference
from bench.evaluation.prediction import Forwards, odds_of, predicted
from bench.evaluation.records import Key, Record
from bench.evaluation.setups import Setup

ALL = "all"


@dataclass(frozen=True)
class Row:
    """``part``: of the data set, "all" or a language, a category, a turn. tok_s: tokens over the medians of their
    times, prompts included, as the reference work counts; decode_tok_s: without the time to the first token. speedup:
    the median of an answer's speed over that of the base in the same repeat, and its quartiles. predicted: tokens per
    second beside decode_tok_s. score: share of right answers, where they were marked.
    """

    data_set: str
    part: str
    setup: str
    batch: int
    temperature: float
    answers: int
    repeats: int
    tokens: int
    tok_s: float
    decode_tok_s: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    decode_speedup: float | None
    acceptance: float | None
    tokens_per_target_forward: float | None
    predicted: float | None
    predicted_off: float | None  # over the measured, minus 1
    score: float | None = None


Scores = Mapping[tuple[str, int, str], bool]  # question, turn, setup: whether its first answer is right


def rows(records: Sequence[Record], setups: Iterable[Setup], scores: Scores | None = None) -> list[Row]:
    """``setups``: those whose options are known; others are not predicted."""
    known = list(setups)
    options = {setup.name: setup.options for setup in known if setup.guesses is None}
    by_key = {record.key: record for record in records}
    parts: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        for part in _parts(record):
            parts.setdefault((record.data_set, part), []).append(record)
    found = []
    for (data_set, part), those in parts.items():
        # Requests of a batch end one after another, and warmer draws hold less often: neither is in the model.
        alone = {r.setup for r in those if r.batch == 1 and r.temperature == 0 and r.setup in options}
        forwards = Forwards.measured(_together(r for r in those if r.setup in alone))
        odds = odds_of(_together(r for r in those if r.setup in alone and _drafts_with_model(options[r.setup])))
        for setup in dict.fromkeys([*(s.name for s in known), *(record.setup for record in those)]):
            mine = [record for record in those if record.setup == setup]
            if mine:
                curves = forwards if setup in alone else None
                rate = predicted(options[setup], curves, odds, _together(mine)) if curves else None
                found.append(_with_prediction(_row(data_set, part, mine, by_key, scores or {}), rate))
    return found


def _drafts_with_model(options: Mapping[str, Any]) -> bool:
    return options.get("window", "auto") != "auto" and options.get("draft") != "ngram"


def _parts(record: Record) -> list[str]:
    """What it is counted in. A batch may mix groups; it is a part of all alone."""
    found = [ALL]
    if len(set(record.groups)) == 1 and record.groups[0] is not None:
        found.append(record.groups[0])
    if record.data_set == "mt_bench":
        found.append(f"turn {record.turn + 1}")
    return found


def _together(records: Iterable[Record]) -> Anatomy:
    return Anatomy.together(record.anatomy for record in records if record.anatomy is not None)


def _row(data_set: str, part: str, mine: Sequence[Record], by_key: Mapping[Key, Record], scores: Scores) -> Row:
    answers: dict[tuple[str, int], list[Record]] = {}
    for record in mine:
        answers.setdefault((" ".join(record.questions), record.turn), []).append(record)
    ratios, decode_ratios = _ratios(mine, by_key)
    low, _, high = _quartiles(ratios)
    tokens = sum(records[0].tokens for records in answers.values())
    seconds = sum(statistics.median(r.seconds for r in records) for records in answers.values())
    together = _together(mine)
    marks = [scores[question, r.turn, r.setup] for r in mine for question in r.questions
             if r.repeat == 0 and (question, r.turn, r.setup) in scores]  # fmt: skip
    verdicts = sum(n for kind, n in together.kinds.items() if kind != "draft")
    produced = sum(record.tokens for record in mine if record.anatomy is not None)
    return Row(
        data_set, part, mine[0].setup, mine[0].batch, mine[0].temperature,
        answers=sum(len(records[0].outputs) for records in answers.values()),
        repeats=max(map(len, answers.values())),
        tokens=tokens,
        tok_s=tokens / seconds,
        decode_tok_s=_decode_speed(answers.values()),
        speedup=statistics.median(ratios) if ratios else None, speedup_low=low, speedup_high=high,
        decode_speedup=statistics.median(decode_ratios) if decode_ratios else None,
        acceptance=together.acceptance,
        tokens_per_target_forward=produced / verdicts if verdicts else None,
        predicted=None, predicted_off=None,
        score=statistics.fmean(marks) if marks else None,
    )  # fmt: skip


def _with_prediction(row: Row, rate: float | None) -> Row:
    off = rate / row.decode_tok_s - 1 if rate is not None and row.decode_tok_s else None
    return Row(**{**asdict(row), "predicted": rate, "predicted_off": off})


def _decode_speed(answers: Iterable[Sequence[Record]]) -> float | None:
    pairs = [[decoding for r in records if (decoding := r.decoding)] for records in answers]
    known = [pair for pair in pairs if pair]
    seconds = sum(statistics.median(seconds for _, seconds in pair) for pair in known)
    return sum(pair[0][0] for pair in known) / seconds if seconds > 0 else None


def _ratios(mine: Sequence[Record], by_key: Mapping[Key, Record]) -> tuple[list[float], list[float]]:
    """Speed over the base's, of each answer; of all time, and of that after the first token."""
    whole, decoding = [], []
    for record in mine:
        base = by_key.get(record.key._replace(setup=record.base))
        if base is None or not record.tokens or not base.tokens:
            continue
        whole.append(record.tokens / record.seconds * base.seconds / base.tokens)
        (tokens, seconds), (theirs, base_seconds) = record.decoding or (0, 0.0), base.decoding or (0, 0.0)
        if tokens and theirs and seconds > 0:
            decoding.append(tokens / seconds * base_seconds / theirs)
    return whole, decoding


def _quartiles(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    if len(values) < 2:
        return None, None, None
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def as_csv(found: Sequence[Row]) -> str:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in found:
        writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in asdict(row).items()})
    return sink.getvalue()


def as_json(
    found: Sequence[Row], records: Sequence[Record], compared: Sequence[Compared], differences: Sequence[Difference]
) -> dict[str, Any]:
    """``anatomy``: of each data set and setup, all its rounds together."""
    anatomies: dict[str, dict[str, Any]] = {}
    for record in records:
        anatomies.setdefault(record.data_set, {}).setdefault(record.setup, []).append(record)
    return {
        "results": [asdict(row) for row in found],
        "equal": [asdict(one) for one in compared],
        "differences": [asdict(difference) for difference in differences],
        "anatomy": {
            data_set: {setup: _together(those).as_json() for setup, those in setups.items()}
            for data_set, setups in anatomies.items()
        },
    }

"""Runs a study: the models, the windows that it needs, its heats; then what it says, as JSON and CSV."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.evaluation.answers import mark
from bench.evaluation.conversations import Conversations
from bench.evaluation.data_sets import Question, load_questions
from bench.evaluation.differences import compare
from bench.evaluation.engines import Agreement, agreements, ours, transformers
from bench.evaluation.entrants import Entrants, share_of_target
from bench.evaluation.heats import Contest, Heat
from bench.evaluation.records import Records
from bench.evaluation.setups import GUESS_WINDOW, PHRASE, Setup, Windows, drafting, prompt_lookup
from bench.evaluation.studies import STUDIES, Field, methods
from bench.evaluation.summary import ALL, Row, as_csv, as_json, rows
from bench.evaluation.tables import results_table
from bench.evaluation.trace import write_trace
from bench.roofline.generators import assistant
from pearl.bench.report import machine, provenance, write_whole
from pearl.engine.model_pair import model_paths
from pearl.errors import ConfigurationError
from pearl.llm import LLM
from pearl.user_values import shown

_BATCH = 8  # of the study of agreement
_AGREEMENT_WINDOWS = Windows(4, 4)


class _Session:
    """One pair of models, and what is asked of it. ``asked``, ``options``: what the program was told."""

    def __init__(
        self,
        out: Path,
        asked: Mapping[str, Any],
        options: Mapping[str, Any],
        data: Path | None,
        console: Console,
        llm: LLM,
    ) -> None:
        self.out, self.asked, self.data, self.console, self.llm = out, asked, data, console, llm
        self.chat = llm.tokenizer.has_chat_template and not asked["plain"]
        self.entrants = Entrants(llm, asked["ignore_eos"])
        config = llm.config
        share = share_of_target(llm)
        self.field = Field(
            config.uses_draft_model, config.most_prepared > 0, assistant(model_paths(config)[1]) is not None,
            None if isinstance(share, str) else share, None,
            tuple(asked["windows"]), tuple(asked["batches"]), tuple(asked["temperatures"]),
            tuple(asked["other_drafts"]),
        )  # fmt: skip
        draft, target = config.resolve_threads()
        self.settings = {
            "target": asked["target"] or "bundled",
            "draft": asked["draft"] or "bundled",
            "other_drafts": asked["other_drafts"],
            "max_tokens": asked["max_tokens"],
            "chat_template": self.chat,
            "ignore_eos": asked["ignore_eos"],
            "dtype": str(llm.models.target.model.dtype).removeprefix("torch."),
            "threads": {"draft": draft, "target": target},
            "devices": {
                "target": [*map(str, config.resolve_target_devices())],
                "draft": str(config.resolve_device("draft")),
            },
            "cpu": machine()["cpu"],
        }

    def questions(self, count: int) -> list[Question]:
        return [q for name in self.asked["data_sets"] for q in load_questions(name, count, self.data)]

    def contest(self, name: str, settings: Mapping[str, Any], repeats: int) -> Contest:
        records = Records(self.out / f"{name}.jsonl", {"study": name, **self.settings, **settings})
        if records.resumed:
            self.console.print(f"{name}: goes on after {records.resumed} answers that are there")
        conversations = Conversations(self.llm, self.chat, self.asked["max_tokens"])
        return Contest(self.entrants, conversations, records, self.asked["max_tokens"], repeats)

    def find_windows(self) -> None:
        """By a study of its own, whose answers are kept like any other's."""
        count = self.asked["search_questions"]
        settings = {"data_sets": self.asked["data_sets"], "questions": count, "windows": self.asked["windows"]}
        contest = self.contest("search", settings, repeats=1)
        contest.run(STUDIES["search"].heats(self.field, self.questions(count)), self.console, "search")
        best = {method: _best(rows(contest.records.all, ()), method) for method in ("speculative", "pearl")}
        self.field = replace(self.field, windows=Windows(**best))
        self.console.print(f"best fixed windows: speculative {best['speculative']}, pearl {best['pearl']}")


def measure(
    name: str, out: Path, asked: Mapping[str, Any], options: Mapping[str, Any], data: Path | None, console: Console,
    command: str,
) -> None:  # fmt: skip
    """``name``: of STUDIES. Raises ConfigurationError before anything is measured."""
    study = STUDIES[name]
    widest = max(*asked["windows"], GUESS_WINDOW) + PHRASE
    largest = max(asked["batches"]) if name == "batches" else 1
    for data_set in asked["data_sets"]:
        load_questions(data_set, 1, data)
    with LLM(**options, method="pearl", prefix_caching=False, max_num_seqs=largest, max_window=widest) as llm:
        session = _Session(out, asked, options, data, console, llm)
        if study.drafts and not session.field.has_draft:
            raise ConfigurationError(f"the study {name} compares ways to use a draft model; leave out --draft ngram")
        if study.searches and session.field.has_draft:
            session.find_windows()
        chosen = _chosen(session)
        questions = session.questions(max(asked["questions"], largest))
        heats = chosen if isinstance(chosen, list) else study.heats(session.field, questions)
        if not heats:
            raise ConfigurationError(f"none of {', '.join(asked['data_sets'])} has what the study {name} asks")
        settings = {key: asked[key] for key in ("data_sets", "questions", "repeats", "setups")}
        contest = session.contest(name, settings | {"windows": _windows_of(session.field)}, asked["repeats"])
        contest.run(heats, console, name)
        _conclude(session, name, contest, heats, command)
        if session.field.windows is not None and not (out / "trace.json").exists():
            write_trace(out / "trace.json", llm, session.field.windows, session.field.prepares)
        session.entrants.close()


def measure_agreement(
    out: Path, asked: Mapping[str, Any], options: Mapping[str, Any], data: Path | None, console: Console, command: str
) -> None:
    """Of the questions' first turns: this engine's methods, alone and in batches, and transformers'."""
    widest = max(GUESS_WINDOW, _AGREEMENT_WINDOWS.speculative) + PHRASE
    found: list[Agreement] = []
    with LLM(**options, method="pearl", prefix_caching=False, max_num_seqs=_BATCH, max_window=widest) as llm:
        session = _Session(out, asked, options, data, console, llm)
        setups = prompt_lookup()
        if session.field.has_draft:
            setups = [*drafting(_AGREEMENT_WINDOWS, prepares=True, phrases=session.field.phrases), *setups]
        conversations = Conversations(llm, session.chat, asked["max_tokens"])
        prompts = [conversations.ids(question, 0, ()) for question in session.questions(asked["questions"])]
        for engine in (ours(llm, setups, _BATCH, asked["max_tokens"]), transformers(llm, asked["max_tokens"], _BATCH)):
            for one in agreements(engine, prompts):
                console.print(f"{one.engine}, {one.way}: {one.equal} of {one.prompts} equal to its own plain decoding")
                found.append(one)
            report = {
                **provenance(), "date": _now(), "command": command, "settings": session.settings,
                "agreements": [asdict(one) for one in found],
            }  # fmt: skip
            write_whole(out / "agreement.json", json.dumps(report, indent=1) + "\n")
        session.entrants.close()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _chosen(session: _Session) -> list[Heat] | None:
    """Of the study of methods, if some are named."""
    names = session.asked["setups"]
    if names is None:
        return None
    known = [setup.name for setup in methods(session.field)]
    for one in names:
        if one not in known:
            raise ConfigurationError(f"--setups: {shown(one)} is none of {', '.join(known)}")
    questions = session.questions(session.asked["questions"])
    return [Heat((q,), tuple(methods(session.field, names)), len(q.turns)) for q in questions]


def _windows_of(field: Field) -> dict[str, int] | None:
    return None if field.windows is None else vars(field.windows)


def _best(found: Sequence[Row], method: str) -> int:
    """Of all data sets together, by time: tokens are the same for all windows."""
    seconds: dict[int, float] = {}
    for row in found:
        kind, at, window = row.setup.partition("@")
        if kind == method and at and row.part == ALL:
            seconds[int(window)] = seconds.get(int(window), 0.0) + row.tokens / (row.decode_tok_s or row.tok_s)
    return min(seconds, key=lambda window: seconds[window])


def _conclude(session: _Session, name: str, contest: Contest, heats: Sequence[Heat], command: str) -> None:
    records = contest.records.all
    compared, differences = compare(records, session.llm)
    setups: dict[str, Setup] = {setup.name: setup for heat in heats for setup in heat.setups}
    scores = None
    if session.asked["check_answers"]:
        questions = {q.key: q for heat in heats for q in heat.questions}
        scores = mark(records, questions, session.llm.tokenizer, session.console)
    found = rows(records, setups.values(), scores)
    report = {
        **provenance(), "date": _now(), "command": command,
        "study": name, "title": STUDIES[name].title,
        "settings": {**session.settings, **{k: session.asked[k] for k in ("data_sets", "questions", "repeats")},
                     "windows": _windows_of(session.field)},
        "resumed_answers": contest.records.resumed, "left_out": contest.left_out,
        **as_json(found, records, compared, differences),
    }  # fmt: skip
    write_whole(session.out / f"{name}.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_whole(session.out / f"{name}.csv", as_csv(found))
    session.console.print(results_table([row for row in found if row.part == ALL], STUDIES[name].title))
    for one in compared:
        if one.equal < one.answers:
            session.console.print(f"{one.setup}: {one.equal} of {one.answers} answers equal to plain decoding's")
    for difference in differences:
        session.console.print(difference.sentence())
    for what, why in contest.left_out.items():
        session.console.print(f"left out: {what}: {why}")

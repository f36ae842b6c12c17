"""The report of all studies in a folder: what was compared, pictures, tables, and where outputs part."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.evaluation import pictures
from bench.evaluation.anatomy import Anatomy
from bench.evaluation.differences import Difference
from bench.evaluation.document import Picture, Section, Table, write_documents
from bench.evaluation.setups import REFERENCE, SHARE
from bench.evaluation.studies import STUDIES
from bench.evaluation.summary import ALL, Row
from bench.evaluation.tables import COLUMNS, cells
from bench.evaluation.token_timeline import span_of, token_timeline
from pearl.errors import ConfigurationError

_TIMELINE_ROUNDS = 7
_MOST_DIFFERENCES = 40
NOT_COMPARABLE = (
    "Lookahead (`lookahead`) and Ouroboros (`ouroboros-like phrases`) are here as this engine can run them exactly: "
    "one candidate a verification, in a window of fixed length. Lookahead's own forward carries several iterations "
    "of Jacobi's method at once and verifies several n-grams as branches, with a mask of its own; here n-grams come "
    "from the rows that verify, so that fewer are found and one is tried. Ouroboros makes phrases while its draft "
    "drafts, speeds up the draft with them, and tries several endings; here a phrase, out of the same n-grams, "
    "makes a window longer, and the draft is as fast as ever. Both are therefore lower bounds of the methods that "
    "they are named after."
)


@dataclass(frozen=True)
class Summary:
    """Of a study, as its JSON says."""

    name: str
    report: Mapping[str, Any]
    rows: Sequence[Row]
    anatomies: Mapping[str, Mapping[str, Anatomy]]

    @classmethod
    def read(cls, path: Path) -> Summary:
        try:
            report = json.loads(path.read_text("utf-8"))
            found = [Row(**row) for row in report["results"]]
            anatomies = {
                data_set: {setup: Anatomy.together([one]) for setup, one in those.items() if one["rounds"]}
                for data_set, those in report["anatomy"].items()
            }
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(
                f"{path} is no summary of this program ({error}); remove it, or run its study again"
            ) from error
        return cls(path.stem, report, found, anatomies)

    @property
    def sets(self) -> list[str]:
        return list(dict.fromkeys(row.data_set for row in self.rows))

    def together(self) -> dict[str, Anatomy]:
        """By setup, all data sets."""
        found: dict[str, list[dict[str, Any]]] = {}
        for those in self.report["anatomy"].values():
            for setup, one in those.items():
                if one["rounds"]:
                    found.setdefault(setup, []).append(one)
        return {setup: Anatomy.together(those) for setup, those in found.items()}


def write_report(folder: Path) -> list[Path]:
    """Returns what was written. ConfigurationError if no study is there, or matplotlib is not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigurationError("the report's pictures need matplotlib: pip install 'pearl-engine[plot]'") from error
    found = {name: Summary.read(folder / f"{name}.json") for name in STUDIES if (folder / f"{name}.json").exists()}
    agreement = folder / "agreement.json"
    if not found and not agreement.exists():
        raise ConfigurationError(f"{folder} holds no study that was measured to its end; run one first")
    sections = [_about(list(found.values()))] if found else []
    for name, summary in found.items():
        sections += _SECTIONS.get(name, _plain_section)(summary)
    trace = folder / "trace.json"
    if trace.exists():
        sections.insert(2 if "methods" in found else 1, _timeline(json.loads(trace.read_text("utf-8"))["runs"]))
    if found:
        sections.append(_equality(list(found.values())))
    if agreement.exists():
        sections.append(_agreement(json.loads(agreement.read_text("utf-8"))))
    return write_documents("PEARL: measured", sections, folder)


def _about(found: Sequence[Summary]) -> Section:
    latest = max(found, key=lambda summary: str(summary.report["date"])).report
    settings, host, versions = latest["settings"], latest["machine"], latest["versions"]
    gpus = ", ".join(host["gpus"]) or "no GPU"
    threads = settings["threads"]
    content: list[str | Table] = [
        f"Target `{settings['target']}`, draft `{settings['draft']}`, {settings['dtype']}; "
        f"{'chat template' if settings['chat_template'] else 'plain prompts'}, up to {settings['max_tokens']} "
        f"tokens an answer. {host['cpu']}, {host['cores']} cores, {gpus}; "
        f"target on {', '.join(settings['devices']['target'])} "
        f"({threads['target']} CPU threads), draft on {settings['devices']['draft']} ({threads['draft']}). "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; commit {latest['commit']}.",
        Table(
            ("study", "date", "questions of each set", "repeats", "answers that were there already", "command"),
            [
                (s.report["title"], s.report["date"], str(s.report["settings"]["questions"]),
                 str(s.report["settings"]["repeats"]), str(s.report["resumed_answers"]), f"`{s.report['command']}`")
                for s in found
            ],
        ),
    ]  # fmt: skip
    return Section("What was measured, and where", content)


def _results(summary: Summary) -> Iterator[Table]:
    for data_set in summary.sets:
        rows = [row for row in summary.rows if row.data_set == data_set and row.part == ALL]
        first = rows[0]
        yield Table(COLUMNS, [(row.setup, *cells(row)) for row in rows], f"{data_set}, {first.answers} answers:")


_COLUMNS_TEXT = (
    "tok/s: answers' tokens over the medians of their times, prompts included. speedup: the median of an answer's "
    "speed over that of `autoregressive` just before or after it, and the middle half of these. holds: share of the "
    "drafted tokens that were tested. predicted: the model of the algorithm over what was measured, decoding alone."
)


def _methods(summary: Summary) -> list[Section]:
    windows = summary.report["settings"]["windows"]
    searched = (
        f"Fixed windows are the best ones of a search: {windows['speculative']} for speculative decoding, "
        f"{windows['pearl']} for PEARL. " if windows else ""
    )  # fmt: skip
    baselines = (
        f"`{REFERENCE}` has all cores for the target; `{SHARE}` those that PEARL leaves it beside a draft. "
        if any(row.setup == SHARE for row in summary.rows) else ""
    )  # fmt: skip
    content: list[str | Picture | Table] = [
        f"{searched}{baselines}Methods answer each question in turns.",
        Picture("speedups", "Speedup over plain decoding; whiskers: the middle half of the answers.",
                partial(pictures.speedups, summary.rows, summary.sets)),
        NOT_COMPARABLE, _COLUMNS_TEXT, *_results(summary),
    ]  # fmt: skip
    return [Section("All methods", content), *_parts(summary), *_anatomy(summary)]


def _parts(summary: Summary) -> list[Section]:
    there = {row.setup for row in summary.rows}
    chosen = [
        name for name in there if name.partition("@")[0] in ("speculative", "pearl", "coupled") and " " not in name
    ]
    chosen = chosen or [name for name in there if name.startswith("n-gram")]
    content = [
        Picture(f"parts-{summary.name}-{data_set}", f"{data_set}, part by part.",
                partial(pictures.parts, summary.rows, data_set, sorted(chosen)))
        for data_set in summary.sets
        if len({row.part for row in summary.rows if row.data_set == data_set}) > 2
    ]  # fmt: skip
    return [Section("Languages, categories, turns", content)] if content else []


def _anatomy(summary: Summary) -> list[Section]:
    together = {setup: found for setup, found in summary.together().items() if setup != "transformers"}
    drafted = {setup: found for setup, found in together.items() if found.positions}
    if not drafted:
        return []
    pearl = next((s for s in drafted if s.startswith("pearl@") and "+" not in s and " " not in s), next(iter(drafted)))
    content: list[str | Picture | Table] = [
        Picture(f"acceptance-{summary.name}", f"Acceptance by place in the verdict, {pearl}.",
                partial(pictures.acceptance, summary.anatomies, pearl)),
        Picture(f"kinds-{summary.name}", "Kinds of rounds.", partial(pictures.kinds, drafted)),
        Picture(f"times-{summary.name}", "Where each side's time goes.", partial(pictures.times, together)),
    ]  # fmt: skip
    for setup, found in drafted.items():
        if found.branches:
            prepared, hit = (sum(counts[i] for counts in found.branches.values()) for i in (0, 1))
            rejections = sum(tested - held for tested, held in found.positions)
            content.append(Picture(
                f"branches-{summary.name}-{len(content)}",
                f"Prepared windows of {setup}: {hit} of {prepared} came true, {hit / max(1, rejections):.0%} of "
                "the rejections found theirs.", partial(pictures.branches, found)))  # fmt: skip
    return [Section("What rounds are made of", content)]


def _windows(summary: Summary) -> list[Section]:
    content: list[str | Picture | Table] = [
        Picture("windows", "Decoding speed over the fixed window, measured and predicted.",
                partial(pictures.windows, summary.rows, summary.sets)),
        _COLUMNS_TEXT, *_results(summary),
    ]  # fmt: skip
    return [Section(summary.report["title"], content)]


def _over_load(summary: Summary, what: str) -> list[Section]:
    content: list[str | Picture | Table] = []
    for data_set in summary.sets:
        content.append(Picture(f"{summary.name}-{data_set}", f"{data_set}.",
                               partial(pictures.over_load, summary.rows, data_set, what)))  # fmt: skip
    return [Section(summary.report["title"], [*content, *_results(summary)])]


def _plain_section(summary: Summary) -> list[Section]:
    return [Section(summary.report["title"], list(_results(summary)))]


_SECTIONS: Mapping[str, Callable[[Summary], list[Section]]] = {
    "search": lambda summary: [],
    "methods": _methods,
    "windows": _windows,
    "batches": partial(_over_load, what="batch"),
    "temperatures": partial(_over_load, what="temperature"),
    "anatomy": lambda summary: [*_anatomy(summary), *_plain_section(summary)],
    "turns": lambda summary: [*_parts(summary), *_plain_section(summary)],
}


def _timeline(runs: Mapping[str, Any]) -> Section:
    draw = partial(token_timeline, runs, span_of({"": list(runs.values())[-1]}, _TIMELINE_ROUNDS))
    bars = "A bar is a forward of the target, with the tokens that it judged, or a window of the draft"
    caption = f"{bars}; dotted lines: verdicts."
    return Section("When each model works, and what becomes of the tokens", [Picture("timeline", caption, draw)])


def _agreement(report: Mapping[str, Any]) -> Section:
    rows = [
        (one["engine"], one["way"], f"{one['equal']} of {one['prompts']}", str(one["tokens"]))
        for one in report["agreements"]
    ]
    text = (
        f"In {report['settings']['dtype']}, as people run it; each engine beside its own plain greedy decoding of "
        f"one prompt at a time. `{report['command']}`, {report['date']}."
    )
    return Section(
        "Drafted and batched, beside plain", [text, Table(("engine", "way", "equal outputs", "equal tokens"), rows)]
    )


def _equality(found: Sequence[Summary]) -> Section:
    content: list[str | Table] = [
        "Every greedy answer, and every coupled one at any temperature, beside plain decoding's, in every "
        "repeat. Where they part, the target was asked for the log-probabilities of both tokens: what bf16's "
        "rounding may turn is a tie."
    ]
    for summary in found:
        rows = [(one["setup"], f"{one['equal']} of {one['answers']}") for one in summary.report["equal"]]
        if rows:
            content.append(Table(("setup", "equal answers"), rows, f"{summary.report['title']}:"))
        differences = [Difference(**difference) for difference in summary.report["differences"]]
        ties = sum(difference.tie for difference in differences)
        if differences:
            content.append(f"{len(differences)} first differences, {ties} of them ties:")
            shown = sorted(differences, key=lambda difference: difference.tie)[:_MOST_DIFFERENCES]
            content += [difference.sentence() for difference in shown]
        content += [f"Left out: {what}: {why}" for what, why in summary.report["left_out"].items()]
    return Section("Equal outputs", content)

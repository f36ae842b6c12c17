"""What was measured, a JSON line for each answer: the state of a study, from which a killed one goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pearl.bench.prompt_sets import read_text
from pearl.errors import ConfigurationError


class Key(NamedTuple):
    """``questions``: keys, joined; a batch has several."""

    questions: str
    turn: int
    setup: str
    repeat: int


@dataclass(frozen=True)
class Record:
    """An answer, or those of a batch: ids of each, and what they took. base: the setup that speedups are over. exact:
    whether the answers must be its own. prompts: ids of each, once for all setups: with the first one's first answer.
    """

    data_set: str
    questions: list[str]
    groups: list[str | None]
    turn: int
    setup: str
    base: str
    batch: int
    temperature: float
    exact: bool
    repeat: int
    prompts: list[list[int]] | None
    outputs: list[list[int]]
    seconds: float
    first_seconds: float | None
    anatomy: dict[str, Any] | None

    @property
    def key(self) -> Key:
        return Key(" ".join(self.questions), self.turn, self.setup, self.repeat)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.outputs))

    @property
    def decoding(self) -> tuple[int, float] | None:
        """Tokens behind each output's first one, and the time after all had it; None if the engine does not tell."""
        if self.first_seconds is None:
            return None
        return self.tokens - len(self.outputs), self.seconds - self.first_seconds


class Records:
    """A file: a line with the settings, then one for each record."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Goes on with the file if it is there. ConfigurationError if it holds other settings, or something else."""
        self._path = path
        found, self._found = read_records(path) if path.exists() else ({}, {})
        self.resumed = len(self._found)
        if not found:  # a new file, or one whose first line was cut in two
            path.write_text(json.dumps({"settings": settings}, ensure_ascii=False) + "\n", "utf-8")
            return
        there = json.loads(json.dumps(settings))
        for name in found | there:
            if found.get(name) != there.get(name):
                raise ConfigurationError(
                    f"{path} was begun with {name} {found.get(name)!r}, and is to go on with {there.get(name)!r}; give "
                    "another --out, or the settings of then"
                )
        whole = path.read_bytes()
        with path.open("r+b") as file:  # a line that was cut in two is measured again
            file.truncate(whole.rfind(b"\n") + 1)

    def __contains__(self, key: Key) -> bool:
        return key in self._found

    def __getitem__(self, key: Key) -> Record:
        return self._found[key]

    def add(self, record: Record) -> None:
        """On disk when this returns, as far as a killed process is concerned."""
        self._found[record.key] = record
        with self._path.open("a", encoding="utf-8") as sink:
            sink.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")

    @property
    def all(self) -> list[Record]:
        return list(self._found.values())


def read_records(path: Path) -> tuple[dict[str, Any], dict[Key, Record]]:
    """Settings and records of whole lines; ({}, {}) of a file without one. ConfigurationError for what is no such
    file."""
    settings: dict[str, Any] = {}
    found: dict[Key, Record] = {}
    whole, _, _ = read_text(path).rpartition("\n")
    for number, line in enumerate(whole.split("\n") if whole else [], 1):
        try:
            row = json.loads(line)
            if number == 1:
                settings = dict(row["settings"])
            else:
                record = Record(**row)
                found[record.key] = record
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigurationError(
                f"{path}, line {number} is no record of this program ({error}); give another --out, or remove the file"
            ) from error
    return settings, found

"""What became of each stage of the GPU suite, kept where the next command finds it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.gpu_suite.files import replace_text
from bench.gpu_suite.process import Ended

OK, FAILED, SKIPPED, CUT_OFF = "ok", "failed", "skipped", "cut off"


@dataclass(frozen=True)
class Outcome:
    """Of a stage. ``reason``: why it is not ok, or what else there is to know."""

    name: str
    status: str
    seconds: float
    reason: str = ""
    commands: tuple[Ended, ...] = ()
    date: str = ""
    commit: str | None = None


def keep(path: Path, outcomes: Sequence[Outcome]) -> None:
    replace_text(path, json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")


def kept(path: Path) -> list[Outcome]:
    """Empty if there is no such file, or one that another version of the suite wrote."""
    try:
        return [_outcome(**entry) for entry in json.loads(path.read_text())]
    except (OSError, ValueError, TypeError):
        return []


def _outcome(commands: Sequence[dict[str, Any]], **entry: Any) -> Outcome:
    return Outcome(
        **entry, commands=tuple(Ended(**{**command, "argv": tuple(command["argv"])}) for command in commands)
    )

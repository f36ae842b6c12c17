"""Latency reports without measuring: numbers that mean nothing, and measurements that fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from bench.round_latency.cell import Interrupted, Load
from bench.round_latency.report import Latencies

LABEL = "synthetic acceptance 0.80: real forwards, scripted verdicts"
TINY = ("--shapes", "tiny-target:tiny-draft", "--device", "cpu")
METHODS = ["autoregressive", "speculative", "pearl"]


def numbers(**changes: float) -> Latencies:
    by_method = dict.fromkeys(METHODS, 1.0)
    values: dict[str, Any] = {field.name: 2.0 for field in fields(Latencies)}
    return Latencies(
        **{**values, **dict.fromkeys(("tok_s", "tok_s_expected", "acceptance_rate"), by_method), **changes}
    )


def cells_of(path: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return cells


class Measurements:
    """In place of ``measure``: the cell numbered ``special`` does something else."""

    def __init__(self, special: int, act: Callable[[], object]) -> None:
        self.loads: list[Load] = []
        self._special, self._act = special, act

    def __call__(self, models: object, config: object, load: Load, stopped: Callable[[], bool]) -> Latencies:
        self.loads.append(load)
        if len(self.loads) == self._special:
            self._act()
            if stopped():
                raise Interrupted
        return numbers()


def failing(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act

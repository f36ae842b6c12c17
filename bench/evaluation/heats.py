"""Setups compete, question after question: all of them answer one, in turns, before the next is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.evaluation.conversations import Conversations, TooLongError
from bench.evaluation.data_sets import Question
from bench.evaluation.entrants import Entrants, Measured
from bench.evaluation.records import Key, Record, Records
from bench.evaluation.setups import Setup
from pearl.errors import PearlError


@dataclass(frozen=True)
class Heat:
    """Questions of one data set, asked at once, that all setups answer. The first setup's answers are what was said
    where further turns follow.
    """

    questions: tuple[Question, ...]
    setups: tuple[Setup, ...]
    turns: int = 1

    def key(self, setup: Setup, turn: int, repeat: int) -> Key:
        return Key(" ".join(q.key for q in self.questions), turn, setup.name, repeat)


@dataclass
class Contest:
    """``left_out``: setups and questions that could not take part, and why."""

    entrants: Entrants
    conversations: Conversations
    records: Records
    max_tokens: int
    repeats: int
    left_out: dict[str, str] = field(default_factory=dict)
    measured: Callable[[Setup, Record, Measured], None] = lambda setup, record, measured: None

    def run(self, heats: Sequence[Heat], console: Console, name: str) -> None:
        """What the records lack. Each repeat begins with another setup and goes the other way round."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        total = sum(len(heat.setups) * heat.turns for heat in heats) * self.repeats
        with Progress(*columns, console=console, refresh_per_second=2) as progress:  # drawing costs the engine time
            task = progress.add_task(name, total=total)

            def advance(what: str) -> None:
                progress.update(task, advance=1, description=f"{name}: {what}")

            for repeat in range(self.repeats):
                for index, heat in enumerate(heats):
                    self._run_heat(heat, repeat, index + repeat, advance)

    def _run_heat(self, heat: Heat, repeat: int, shift: int, advance: Callable[[str], None]) -> None:
        for turn in range(heat.turns):
            prompts = self._prompts(heat, turn)
            for setup in _order(heat.setups, shift):
                if prompts is not None and heat.key(setup, turn, repeat) not in self.records:
                    self._measure(heat, setup, turn, repeat, prompts)
                advance(f"{heat.questions[0].data_set}, {setup.name}")

    def _prompts(self, heat: Heat, turn: int) -> list[list[int]] | None:
        """None if there is no room for one of them, or nothing was said before."""
        try:
            said = [self.records[heat.key(heat.setups[0], before, 0)].outputs for before in range(turn)]
            return [
                self.conversations.ids(question, turn, [outputs[index] for outputs in said])
                for index, question in enumerate(heat.questions)
            ]
        except TooLongError as error:
            self.left_out[f"{heat.questions[0].key}, turn {turn + 1}"] = str(error)
        except KeyError:
            pass  # the turn before was left out
        return None

    def _measure(self, heat: Heat, setup: Setup, turn: int, repeat: int, prompts: Sequence[list[int]]) -> None:
        if setup.name in self.left_out:
            return
        try:
            measured = self.entrants.answer(setup, prompts, self.max_tokens)
        except (PearlError, ImportError, torch.OutOfMemoryError) as error:
            if setup.name == setup.base:
                raise
            self.left_out[setup.name] = str(error)
            return
        record = Record(
            data_set=heat.questions[0].data_set,
            questions=[question.key for question in heat.questions],
            groups=[question.group for question in heat.questions],
            turn=turn,
            setup=setup.name,
            base=setup.base,
            batch=setup.batch,
            temperature=setup.temperature,
            exact=setup.exact,
            repeat=repeat,
            prompts=[*map(list, prompts)] if setup == heat.setups[0] and repeat == 0 else None,
            outputs=measured.outputs,
            seconds=measured.seconds,
            first_seconds=measured.first_seconds,
            anatomy=measured.anatomy.as_json() if measured.anatomy else None,
        )
        self.records.add(record)
        self.measured(setup, record, measured)


def _order(setups: Sequence[Setup], shift: int) -> Iterator[Setup]:
    """The same ones, from another one on, every second time backwards."""
    begin = shift // 2 % len(setups)
    turned = [*setups[begin:], *setups[:begin]]
    return iter(turned if shift % 2 == 0 else turned[::-1])

"""A training run, which continues from its last checkpoint, and what it made is worth on texts that it never saw."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from bench.drafter_training.data import Text, Texts
from bench.drafter_training.lessons import Learner, Step
from pearl.devices import cpu_cores

T = TypeVar("T")
_DECAY = 0.8  # of a step's weight, from one to the next
_APART = 3.0  # weight of a feature's distance from the target's, as in EAGLE-1: it tells more of a text than tokens do
_SAVED_EVERY = 120.0  # seconds
_STALLED = 30.0  # seconds of a step: the process was suspended, which is not training time


@dataclass(frozen=True)
class Options:
    device: str
    rows: int
    steps: int  # of a rollout
    lr: float
    held_out: int  # texts


@dataclass(frozen=True)
class Worth:
    """Held out. By step of a window, given that all before it held: how often the likeliest token is the target's; and
    how often a token drawn from the one would be accepted by the other, at temperature 1.
    """

    loss: float
    greedy: tuple[float, ...]
    sampled: tuple[float, ...]


class Trainer:
    def __init__(self, learner: Learner, texts: Texts, out: Path, options: Options) -> None:
        self._learner, self._texts, self.options = learner, texts, options
        learnt = [parameter for parameter in learner.module.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(learnt, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self._file, self._rng = out / "checkpoint.pt", np.random.default_rng(1)
        self.step, self.elapsed = 0, 0.0

    def restore(self) -> bool:
        """Go on where the last run was. typer.BadParameter if that was of another drafter."""
        if not self._file.exists():
            return False
        state: dict[str, Any] = torch.load(self._file, map_location=self.options.device)
        if state.get("origin") != self._learner.origin:
            raise typer.BadParameter(f"{self._file} is of another drafter or vocabulary; give what it was begun with")
        self._learner.module.load_state_dict(state["drafter"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rng.bit_generator.state = state["rng"]
        self.step, self.elapsed = state["step"], state["elapsed"]
        return True

    def save(self) -> None:
        state = {"drafter": self._learner.module.state_dict(), "optimizer": self._optimizer.state_dict(),
                 "step": self.step, "rng": self._rng.bit_generator.state, "elapsed": self.elapsed,
                 "origin": self._learner.origin}  # fmt: skip
        unfinished = self._file.with_suffix(".partial")
        torch.save(state, unfinished)
        unfinished.replace(self._file)  # an interruption never leaves a torn checkpoint

    def fit(self, minutes: float, console: Console, most_steps: int = 0) -> None:
        """Until ``minutes`` of training are spent, restarts included, or so many steps made (0: any)."""
        columns = [TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("{task.fields[status]}"),
                   TimeElapsedColumn(), TimeRemainingColumn()]  # fmt: skip
        last, saved = time.monotonic(), self.elapsed
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=minutes * 60, completed=int(self.elapsed), status="", step=self.step)
            while self.elapsed < minutes * 60 and not 0 < most_steps <= self.step:
                loss = self._learn(max(self.elapsed / (minutes * 60), self.step / most_steps if most_steps else 0.0))
                now = time.monotonic()
                self.elapsed, last = self.elapsed + min(now - last, _STALLED), now
                bar.update(task, completed=self.elapsed, step=self.step, status=f"loss {loss:.3f}")
                if self.step % 500 == 0:
                    console.print(f"step {self.step}: {self.worth()}")
                if self.elapsed - saved > _SAVED_EVERY:
                    self.save()
                    saved = self.elapsed
        self.save()

    def _learn(self, progress: float) -> float:
        warm = min(1.0, (self.step + 1) / 20)
        for group in self._optimizer.param_groups:
            group["lr"] = self.options.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        self._learner.module.train()
        texts = self._texts.sample(self._rng, self.options.rows)
        self._optimizer.zero_grad()
        # The first token of a window first: it is cheapest to learn, and the others stand on it.
        steps = min(self._steps, 1 + int(progress * self._steps))
        # One by one: nothing is padded, and what is before the answer is only looked at.
        total = sum(self._each(partial(self._descend, steps=steps), texts)) / len(texts)
        torch.nn.utils.clip_grad_norm_(self._learner.module.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        return total

    def _descend(self, text: Text, steps: int) -> float:
        """Add a text's gradient. The threads' are added one after the other: autograd's own lock sees to it."""
        weights = [_DECAY**step for step in range(steps)]
        found = zip(weights, self._learner.steps(text, steps), strict=True)
        loss = sum(weight * (one.losses + _APART * one.apart).mean() for weight, one in found) / sum(weights)
        assert isinstance(loss, Tensor)
        (loss / self.options.rows).backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def _each(self, work: Callable[[Text], T], texts: Sequence[Text]) -> list[T]:
        """On CPU a thread for each core, each with texts of its own: small products gain little from two cores, and
        where others run too, wait for the one that was held up.
        """
        if self.options.device != "cpu":
            return [work(text) for text in texts]
        with ThreadPoolExecutor(cpu_cores(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, texts))

    def worth(self) -> Worth:
        self._learner.module.eval()
        found = self._each(self._judge, self._texts.held_out[: self.options.held_out])
        if not sum(len(one[0].same) for one in found):
            raise typer.BadParameter("no text is held out; give more texts or answers")
        steps = [[torch.cat(parts) for parts in zip(*step, strict=True)] for step in zip(*found, strict=True)]
        losses, _, same, shared = ([row[place].float().mean().item() for row in steps] for place in range(4))
        return Worth(sum(losses) / len(losses), tuple(same), tuple(shared))

    @torch.no_grad()
    def _judge(self, text: Text) -> Sequence[Step]:
        return self._learner.steps(text, self._steps)

    @property
    def _steps(self) -> int:
        return min(self.options.steps, self._learner.most_steps)

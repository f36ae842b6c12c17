"""A head's training run, which continues from its last checkpoint, and what it is worth on texts that it never saw."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from bench.head_training.data import Batch, Texts
from bench.head_training.model import TrainedHead

_DECAY = 0.8  # of a step's weight, from one to the next
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
    """Held out. By step of a window, given that all before it held: how often the head's likeliest token is the
    target's; and how often a token drawn from the one would be accepted by the other, at temperature 1.
    """

    loss: float
    greedy: tuple[float, ...]
    sampled: tuple[float, ...]


class HeadTrainer:
    def __init__(self, head: TrainedHead, target: PreTrainedModel, texts: Texts, out: Path, options: Options) -> None:
        self.head, self.options = head.to(options.device), options
        self._target, self._texts = target.to(options.device).eval().requires_grad_(False), texts  # type: ignore[arg-type]
        self._layers = head.shape["eagle_aux_hidden_state_layer_ids"]
        self._optimizer = torch.optim.AdamW(head.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self._file, self._rng = out / "checkpoint.pt", np.random.default_rng(1)
        self.step, self.elapsed = 0, 0.0

    def restore(self) -> bool:
        """Go on where the last run was. typer.BadParameter if that was of another head."""
        if not self._file.exists():
            return False
        state: dict[str, Any] = torch.load(self._file, map_location=self.options.device)
        if state["shape"] != self.head.shape or not torch.equal(state["kept"].cpu(), self.head.kept.cpu()):
            raise typer.BadParameter(f"{self._file} is of another head or vocabulary; give what it was begun with")
        self.head.load_state_dict(state["head"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rng.bit_generator.state = state["rng"]
        self.step, self.elapsed = state["step"], state["elapsed"]
        return True

    def save(self) -> None:
        state = {"head": self.head.state_dict(), "optimizer": self._optimizer.state_dict(), "step": self.step,
                 "rng": self._rng.bit_generator.state, "elapsed": self.elapsed, "shape": self.head.shape,
                 "kept": self.head.kept}  # fmt: skip
        partial = self._file.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._file)  # an interruption never leaves a torn checkpoint

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
        self.head.train()
        losses, _ = self._rollout(self._texts.sample(self._rng, self.options.rows))
        loss = sum(_DECAY**step * one for step, one in enumerate(losses)) / sum(_DECAY**s for s in range(len(losses)))
        assert isinstance(loss, Tensor)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        return loss.item()

    @torch.no_grad()
    def worth(self) -> Worth:
        self.head.eval()
        losses, same, overlap, count = 0.0, *(torch.zeros(self.options.steps) for _ in range(3))
        for batch in self._texts.held_out_batches(self.options.rows, self.options.held_out):
            found, rows = self._rollout(batch)
            for step, (one, (likeliest, shared, wanted)) in enumerate(zip(found, rows, strict=True)):
                losses += one.item() * wanted.sum().item() / self.options.steps
                same[step] += likeliest[wanted].sum().item()
                overlap[step] += shared[wanted].sum().item()
                count[step] += wanted.sum().item()
        if not count[0]:
            raise typer.BadParameter("no text is held out; give more texts or answers")
        return Worth(losses / count[0].item(), tuple((same / count).tolist()), tuple((overlap / count).tolist()))

    def _rollout(self, batch: Batch) -> tuple[list[Tensor], list[tuple[Tensor, Tensor, Tensor]]]:
        """Of each step: the loss; and of each position whether the likeliest token is the target's, the probability
        that both give alike, and whether it counts.
        """
        ids, counts = batch.ids.to(self.options.device), batch.counts.to(self.options.device)
        with torch.no_grad():
            given = self._target(ids, output_hidden_states=True, use_cache=False)
            states = torch.cat([given.hidden_states[layer] for layer in self._layers], -1).float()
            embedded, target = self._target.get_input_embeddings()(ids).float(), given.logits.float()
        losses, rows = [], []
        for step, logits in enumerate(self.head.rollout(states, embedded, self.options.steps)):
            n = logits.shape[1]
            row = target[:, step + 1 : step + 1 + n]  # of the token at t + 2 + step
            wanted = counts[:, step + 2 : step + 2 + n]
            log_q = logits.log_softmax(-1)
            own = row[..., self.head.kept]
            # What the head cannot draft it cannot learn; where the target would say that, nothing is learnt.
            can = wanted & (own.amax(-1) >= row.amax(-1))
            loss = -(own.softmax(-1) * log_q).sum(-1)
            losses.append((loss * can).sum() / can.sum().clamp(min=1))
            shared = torch.minimum(row.softmax(-1)[..., self.head.kept], log_q.exp()).sum(-1)
            likeliest = self.head.kept[logits.argmax(-1)] == row.argmax(-1)
            rows.append((likeliest, shared, wanted))
        return losses, rows

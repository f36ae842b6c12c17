"""One model's training run, which continues from its last checkpoint."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import LlamaForCausalLM

from bench.training.corpus import Corpus


@dataclass(frozen=True)
class Options:
    device: str
    sequence: int
    micro_batch: int
    accumulate: int
    compile: bool


class Trainer:
    """One model's run: schedule, optimizers, checkpoints. A checkpoint holds everything a restart needs."""

    def __init__(self, name: str, model: LlamaForCausalLM, corpus: Corpus, out: Path, options: Options, lr: float,
                 teacher: LlamaForCausalLM | None = None) -> None:  # fmt: skip
        self.name, self.corpus, self.options, self.peak_lr, self.teacher = name, corpus, options, lr, teacher
        self.model = model.to(options.device)  # type: ignore[arg-type]
        self.checkpoint_path = out / f"{name}.checkpoint.pt"
        hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "lm_head" not in n]
        others = [p for p in model.parameters() if all(p is not h for h in hidden)]
        # Muon orthogonalises the update of a hidden matrix; "match_rms_adamw" lets both optimizers share one schedule.
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.95)),
        ]
        self.rng = np.random.default_rng(1)
        self.step, self.tokens, self.elapsed = 0, 0, 0.0
        self.loss_fn = torch.compile(self._loss) if options.compile else self._loss

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        x, y = ids[:, :-1], ids[:, 1:].flatten()
        with torch.autocast(self.options.device, torch.bfloat16):
            logits = self.model(x).logits
            if self.teacher is not None:
                with torch.no_grad():
                    teacher_logits = self.teacher(x).logits
        log_p = F.log_softmax(logits.float().flatten(0, 1), -1)
        loss = F.nll_loss(log_p, y)
        if self.teacher is not None:
            teacher_log_p = F.log_softmax(teacher_logits.float().flatten(0, 1), -1)
            loss = 0.1 * loss + 0.9 * F.kl_div(log_p, teacher_log_p, log_target=True, reduction="batchmean")
        return loss

    def heldout_loss(self) -> float:
        rng, total, batches = np.random.default_rng(0), 0.0, 16
        self.model.eval()
        with torch.no_grad(), torch.autocast(self.options.device, torch.bfloat16):
            for _ in range(batches):
                ids = self.corpus.batch(rng, self.options.micro_batch, self.options.sequence, heldout=True)
                ids = ids.to(self.options.device)
                logits = self.model(ids[:, :-1]).logits.float().flatten(0, 1)
                total += F.cross_entropy(logits, ids[:, 1:].flatten()).item()
        self.model.train()
        return total / batches

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
            "rng": self.rng.bit_generator.state, "step": self.step, "tokens": self.tokens, "elapsed": self.elapsed,
        }  # fmt: skip
        partial = self.checkpoint_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint_path)  # an interruption never leaves a torn checkpoint

    def restore(self) -> bool:
        if not self.checkpoint_path.exists():
            return False
        state: dict[str, Any] = torch.load(self.checkpoint_path, map_location=self.options.device)
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:
            raise typer.BadParameter(
                f"{self.checkpoint_path} is of another shape; give the shapes it was begun with, or another OUT"
            ) from error
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.bit_generator.state = state["rng"]
        self.step, self.tokens, self.elapsed = state["step"], state["tokens"], state["elapsed"]
        return True

    def _optimizer_step(self, progress: float) -> float:
        warmup = min(1.0, (self.step + 1) / 100)
        lr = self.peak_lr * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        total = 0.0
        for _ in range(self.options.accumulate):
            ids = self.corpus.batch(self.rng, self.options.micro_batch, self.options.sequence)
            loss = self.loss_fn(ids.to(self.options.device)) / self.options.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
            self.tokens += ids[:, 1:].numel()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return total

    def fit(self, minutes: float, console: Console) -> None:
        """Train until ``minutes`` of this trainer's own time are spent (restarts do not start the clock again)."""
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"),
                   TimeElapsedColumn(), TimeRemainingColumn()]  # fmt: skip
        self.model.train()
        warm_up = self.corpus.batch(self.rng, self.options.micro_batch, self.options.sequence)
        self.loss_fn(warm_up.to(self.options.device))
        last, last_saved = time.monotonic(), self.elapsed
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(self.name, total=minutes * 60, completed=int(self.elapsed), status="compiling")
            while self.elapsed < minutes * 60:
                loss = self._optimizer_step(self.elapsed / (minutes * 60))
                now = time.monotonic()
                # A longer step means that the process was suspended: that is not training time.
                self.elapsed, last = self.elapsed + min(now - last, 30.0), now
                bar.update(task, completed=self.elapsed, status=f"{self.tokens / 1e6:.2f}M tokens  loss {loss:.3f}")
                if self.step % 200 == 0:
                    console.print(
                        f"{self.name} step {self.step}: {self.tokens / 1e6:.2f}M tokens, {self.elapsed / 60:.1f} min, "
                        f"loss {loss:.3f}, held-out {self.heldout_loss():.3f}"
                    )
                if self.elapsed - last_saved > 120:
                    self.save()
                    last_saved = self.elapsed
        self.save()
        self.model.eval()

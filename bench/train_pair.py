"""Train the bundled draft/target pair on the interpreter's standard library.

    python bench/train_pair.py OUT --target-minutes 60 --draft-minutes 30
    python bench/train_pair.py OUT --init pearl/models/bundled     # start from an existing pair

Any size, CPU or GPU. The target is trained on the source text; the draft is then distilled from the target
(KL to its full distribution, plus a little cross-entropy). Run the same command again after an interruption: it
continues from the last checkpoint. Files the models never saw are listed in OUT/heldout.txt, and the closing line
reports loss and greedy agreement on them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# A code completer has no turns: chatting with it continues the text of the messages.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
# glibc's default returns every large activation to the kernel; page faults then cost 4/5 of a CPU training step.
CPU_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 30),
    "OMP_WAIT_POLICY": "passive",
}
console = Console()


@dataclass(frozen=True)
class Shape:
    """Size of one model; written ``hidden:layers:heads:kv_heads:ffn`` on the command line."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        parts = text.split(":")
        if len(parts) != 5 or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise typer.BadParameter(f"{text!r} is not hidden:layers:heads:kv_heads:ffn, five positive integers")
        return cls(*map(int, parts))

    def build(self, vocab: int) -> LlamaForCausalLM:
        config = LlamaConfig(
            vocab_size=vocab, hidden_size=self.hidden, intermediate_size=self.ffn, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.kv_heads, head_dim=64,
            max_position_embeddings=2048, rope_theta=10000.0, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=0, rms_norm_eps=1e-5, use_cache=False,
        )  # fmt: skip
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Corpus:
    train: np.ndarray  # uint16 token ids, files joined by END_OF_TEXT
    heldout: np.ndarray

    def batch(self, rng: np.random.Generator, rows: int, length: int, heldout: bool = False) -> torch.Tensor:
        data = self.heldout if heldout else self.train
        starts = rng.integers(0, len(data) - length - 1, rows)
        return torch.from_numpy(np.stack([data[s : s + length + 1] for s in starts]).astype(np.int64))


def read_files() -> tuple[dict[str, str], dict[str, str]]:
    """Split the standard library's sources into (training, held-out) texts by a hash of the file's name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: dict[str, str] = {}
    heldout: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if "site-packages" in path.parts or "lib2to3/tests/data" in name:
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:  # a few test inputs are not UTF-8 on purpose
            continue
        generated_table = {"test", "tests", "idle_test"} & set(path.parts) and len(text) > 200_000
        if len(text) >= 200 and not generated_table:
            (heldout if sum(map(ord, name)) % 50 == 0 else train)[name] = text
    return train, heldout


def train_tokenizer(texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose pre-tokenizer keeps a line break with its indentation, so that code costs few tokens."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r"\n[ \t]*| ?[A-Za-z_]+| ?\d| ?[^\sA-Za-z_\d]+|[ \t]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], rng: np.random.Generator) -> np.ndarray:
    order = rng.permutation(len(texts))
    encoded = tokenizer.backend_tokenizer.encode_batch([texts[i] for i in order])
    ids = [np.concatenate([[tokenizer.eos_token_id], e.ids]) for e in encoded]
    return np.concatenate(ids).astype(np.uint16)


class Trainer:
    """One model's run: schedule, optimizers, checkpoints. A checkpoint holds everything a restart needs."""

    def __init__(self, name: str, model: LlamaForCausalLM, corpus: Corpus, out: Path, options: Options, lr: float,
                 teacher: LlamaForCausalLM | None = None) -> None:  # fmt: skip
        self.name, self.corpus, self.options, self.peak_lr, self.teacher = name, corpus, options, lr, teacher
        self.model = model.to(options.device)
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
            loss.backward()
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

    def fit(self, minutes: float) -> None:
        """Train until ``minutes`` of this trainer's own time are spent (restarts do not start the clock again)."""
        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[status]}"),
                   TimeElapsedColumn(), TimeRemainingColumn()]  # fmt: skip
        self.model.train()
        warm_up = self.corpus.batch(self.rng, self.options.micro_batch, self.options.sequence)
        self.loss_fn(warm_up.to(self.options.device))
        last, last_saved = time.monotonic(), self.elapsed
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(self.name, total=minutes * 60, completed=self.elapsed, status="compiling")
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


@dataclass(frozen=True)
class Options:
    device: str
    sequence: int
    micro_batch: int
    accumulate: int
    compile: bool


def agreement(target: LlamaForCausalLM, draft: LlamaForCausalLM, corpus: Corpus, options: Options) -> dict[str, float]:
    """Teacher-forced on held-out code: greedy agreement, and sum(min(p, q)), the T=1 acceptance probability."""
    rng, same, overlap, count = np.random.default_rng(2), 0.0, 0.0, 0
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16):
        for _ in range(16):
            ids = corpus.batch(rng, options.micro_batch, options.sequence, heldout=True)[:, :-1].to(options.device)
            p, q = (m(ids).logits.float().softmax(-1) for m in (target, draft))
            same += (p.argmax(-1) == q.argmax(-1)).sum().item()
            overlap += torch.minimum(p, q).sum().item()
            count += ids.numel()
    return {"greedy_agreement": same / count, "overlap": overlap / count}


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.float()


def load_init(folder: Path | None, name: str, shape: Shape, vocab: int) -> LlamaForCausalLM:
    if folder is not None and (folder / name / "model.safetensors").exists():
        return LlamaForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
    return shape.build(vocab)


def main(
    out: Annotated[Path, typer.Argument(help="Folder for checkpoints, the two models and heldout.txt")],
    target: Annotated[str, typer.Option(help="hidden:layers:heads:kv_heads:ffn")] = "384:8:6:2:1152",
    draft: Annotated[str, typer.Option(help="hidden:layers:heads:kv_heads:ffn")] = "256:2:4:1:640",
    target_minutes: Annotated[float, typer.Option(help="Training time of the target")] = 60,
    draft_minutes: Annotated[float, typer.Option(help="Distillation time of the draft")] = 30,
    vocab: Annotated[int, typer.Option(help="Vocabulary of a new tokenizer")] = 4096,
    init: Annotated[Path | None, typer.Option(help="Existing pair: tokenizer, and weights to start from")] = None,
    init_draft: Annotated[bool, typer.Option(help="Start the draft from --init too")] = False,
    target_lr: float = 2e-3,
    draft_lr: float = 4e-3,
    sequence: int = 512,
    micro_batch: int = 4,
    accumulate: int = 4,
    compile: bool = True,
) -> None:
    """Train a target, distil a draft from it, and export both in Hugging Face layout."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and any(os.environ.get(k) != v for k, v in CPU_ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | CPU_ENVIRONMENT)  # malloc reads it at start
    options = Options(device, sequence, micro_batch, accumulate, compile)
    target_shape, draft_shape = Shape.parse(target), Shape.parse(draft)
    if init is not None and not (init / "target" / "tokenizer.json").exists():
        raise typer.BadParameter(f"{init} holds no pair: target/tokenizer.json is missing")
    if init_draft and init is None:
        raise typer.BadParameter("--init-draft needs --init, the pair whose draft to start from")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    train, heldout = read_files()
    (out / "heldout.txt").write_text("".join(f"{name}\n" for name in heldout))
    source = init / "target" if init else out / "tokenizer"
    if init is None and not source.exists():
        train_tokenizer(list(train.values()), vocab).save_pretrained(source)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer.chat_template = CHAT_TEMPLATE
    rng = np.random.default_rng(0)
    corpus = Corpus(encode(tokenizer, list(train.values()), rng), encode(tokenizer, list(heldout.values()), rng))
    console.print(f"{len(train)} files, {len(corpus.train) / 1e6:.2f}M tokens; {len(heldout)} files held out, "
                  f"{len(corpus.heldout) / 1e6:.2f}M tokens; {device}")  # fmt: skip

    big = Trainer("target", load_init(init, "target", target_shape, len(tokenizer)), corpus, out, options, target_lr)
    big.restore()
    big.fit(target_minutes)
    export(big.model, tokenizer, out / "target")
    student = load_init(init if init_draft else None, "draft", draft_shape, len(tokenizer))
    small = Trainer("draft", student, corpus, out, options, draft_lr, teacher=big.model.requires_grad_(False))
    small.restore()
    small.fit(draft_minutes)
    export(small.model, tokenizer, out / "draft")
    report = {"target_loss": big.heldout_loss(), "draft_loss": small.heldout_loss(), "target_tokens": big.tokens,
              "draft_tokens": small.tokens, **agreement(big.model, small.model, corpus, options)}  # fmt: skip
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(out / "tokenizer", ignore_errors=True)
    console.print(report)


if __name__ == "__main__":
    typer.run(main)

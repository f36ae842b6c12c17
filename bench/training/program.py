"""``python bench/train_pair.py``: train a target, distil a draft from it, export both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from bench.shared.malloc import restart_for_training
from bench.training.corpus import Corpus, encode, read_files, train_tokenizer
from bench.training.models import Shape, agreement, export, load_init
from bench.training.trainer import Options, Trainer

# A code completer has no turns: chatting with it continues the text of the messages.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


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
    console = Console()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    restart_for_training()
    options = Options(device, sequence, micro_batch, accumulate, compile)
    target_shape, draft_shape = Shape.parse(target), Shape.parse(draft)
    if init is not None and not (init / "target" / "tokenizer.json").exists():
        raise typer.BadParameter(f"{init} holds no pair: target/tokenizer.json is missing")
    if init_draft and init is None:
        raise typer.BadParameter("--init-draft needs --init, the pair whose draft to start from")
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    tokenizer, corpus = _read_corpus(out, init, vocab, console, device)
    big = Trainer("target", load_init(init, "target", target_shape, len(tokenizer)), corpus, out, options, target_lr)
    big.restore()
    big.fit(target_minutes, console)
    export(big.model, tokenizer, out / "target")
    student = load_init(init if init_draft else None, "draft", draft_shape, len(tokenizer))
    small = Trainer("draft", student, corpus, out, options, draft_lr, teacher=big.model.requires_grad_(False))
    small.restore()
    small.fit(draft_minutes, console)
    export(small.model, tokenizer, out / "draft")
    report = {"target_loss": big.heldout_loss(), "draft_loss": small.heldout_loss(), "target_tokens": big.tokens,
              "draft_tokens": small.tokens, **agreement(big.model, small.model, corpus, options)}  # fmt: skip
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    shutil.rmtree(out / "tokenizer", ignore_errors=True)
    console.print(report)


def _read_corpus(
    out: Path, init: Path | None, vocab: int, console: Console, device: str
) -> tuple[PreTrainedTokenizerFast, Corpus]:
    """All files as tokens; which of them are held out is written into ``out``."""
    train, heldout = read_files()
    (out / "heldout.txt").write_text("".join(f"{name}\n" for name in heldout))
    tokenizer = _tokenizer(out, init, list(train.values()), vocab)
    rng = np.random.default_rng(0)
    corpus = Corpus(encode(tokenizer, list(train.values()), rng), encode(tokenizer, list(heldout.values()), rng))
    console.print(f"{len(train)} files, {len(corpus.train) / 1e6:.2f}M tokens; {len(heldout)} files held out, "
                  f"{len(corpus.heldout) / 1e6:.2f}M tokens; {device}")  # fmt: skip
    return tokenizer, corpus


def _tokenizer(out: Path, init: Path | None, texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """``init``'s, or one made of the texts."""
    source = init / "target" if init else out / "tokenizer"
    if init is None and not source.exists():
        train_tokenizer(texts, vocab).save_pretrained(source)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer

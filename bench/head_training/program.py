"""``python bench/train_drafter.py``: data, training, and the files of a head."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM

from bench.head_training.data import Text, Texts, answers, cut_into_texts, own_questions, read_questions
from bench.head_training.model import TrainedHead, shape_of
from bench.head_training.precision import fast_dtype
from bench.head_training.states import StateFile
from bench.head_training.trainer import HeadTrainer, Options
from bench.training.corpus import read_files
from pearl.models import Tokenizer, bundled_path


def main(
    out: Annotated[Path, typer.Argument(help="Folder for answers, checkpoint, report.json, and the head itself")],
    target: Annotated[str, typer.Option(help="Folder of the target; default: the bundled one")] = "",
    prompts: Annotated[list[Path] | None, typer.Option(help="JSON lines with questions for a chat model")] = None,
    own: Annotated[int, typer.Option("--own-questions", help="Questions that a chat model asks itself")] = 0,
    files: Annotated[int, typer.Option(help="Files of the standard library to learn from as text; 0: none")] = 200,
    answer_count: Annotated[int, typer.Option("--answers", help="Answers of the target to learn from")] = 2000,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most")] = 192,
    temperature: Annotated[float, typer.Option(help="That the answers are drawn at")] = 0.7,
    vocab: Annotated[int, typer.Option(help="Ids that the head can draft: the most frequent ones")] = 8192,
    ffn: Annotated[int, typer.Option(help="Feed-forward width of the head; 0: the target's")] = 0,
    minutes: Annotated[float, typer.Option(help="Of training, restarts included")] = 60,
    most_steps: Annotated[int, typer.Option(help="Stop after so many; 0: never")] = 0,
    sequence: Annotated[int, typer.Option(help="Tokens of a text, at most")] = 256,
    rows: Annotated[int, typer.Option(help="Texts of a step")] = 4,
    steps: Annotated[int, typer.Option(min=1, max=8, help="Tokens that a window is rolled out to, at the end")] = 5,
    learn_vocabulary: Annotated[
        bool, typer.Option(help="Learn the last matrix too, of much data; else it stays the target's")
    ] = False,
    lr: float = 1e-3,
    held_out: Annotated[int, typer.Option(help="Texts that a report looks at, at most")] = 64,
) -> None:
    """Train an EAGLE-3 head for a target, and write it in the published format."""
    console, path = Console(), target or str(bundled_path("target"))
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_pretrained(path)
    pieces = cut_into_texts(tokenizer, list(read_files()[0].values())[:files], sequence)
    questions = [text for file in prompts or [] for text in read_questions(file)]
    if own:
        questions += own_questions(path, tokenizer, out / "questions.jsonl", own, sequence // 2, console)
    asked = _asked(tokenizer, questions, pieces, answer_count, sequence // 2)
    written = answers(path, asked, out / "answers.jsonl", answer_tokens, temperature, console)
    mixed = [*written, *pieces]
    order = np.random.default_rng(0).permutation(len(mixed))
    texts = Texts((mixed[index] for index in order), sequence)
    judge = AutoModelForCausalLM.from_pretrained(path, dtype=fast_dtype(device), trust_remote_code=False)
    kept = _drafted_ids(texts, tokenizer, vocab)
    head = TrainedHead(shape_of(judge, len(kept), ffn), judge, kept)
    head.lm_head.requires_grad_(learn_vocabulary)
    states = StateFile(out, judge, [*head.shape["eagle_aux_hidden_state_layer_ids"], judge.config.num_hidden_layers])
    embeddings = judge.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    trainer = HeadTrainer(head, embeddings, states, texts, out, Options(device, rows, steps, lr, held_out))
    trainer.restore()
    console.print(f"{len(texts.train)} texts, {len(texts.held_out)} held out; {len(kept)} ids to draft; {device}")
    before = trainer.worth() if not trainer.step else None
    trainer.fit(minutes, console, most_steps)
    trainer.head.save(out / "head")
    report = {"steps": trainer.step, "seconds": trainer.elapsed, "held_out": asdict(trainer.worth()),
              **({"before": asdict(before)} if before is not None else {})}  # fmt: skip
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(report)


def _drafted_ids(texts: Texts, tokenizer: Tokenizer, count: int) -> list[int]:
    """The most frequent ones, rising; if there are fewer, the lowest others: ids of merges rise with their rarity."""
    kept = [token for token, _ in texts.frequencies().most_common(count)]
    others = sorted(set(range(tokenizer.vocab_size)).difference(kept))
    return sorted([*kept, *others[: count - len(kept)]])


def _asked(tokenizer: Tokenizer, questions: list[str], pieces: list[Text], count: int, length: int) -> list[list[int]]:
    """Prompts: of a chat model questions in its template; else beginnings of texts."""
    if questions:
        talks = [tokenizer.render_chat([{"role": "user", "content": text}]) for text in questions]
        asked = [ids for ids in talks if len(ids) <= length]
    else:
        asked = [list(piece.ids[: max(8, length // 2)]) for piece in pieces if len(piece.ids) > 16]
    if not asked:
        raise typer.BadParameter("there is nothing to ask the target: give --prompts, --own-questions or --files")
    return [asked[index % len(asked)] for index in range(count)]

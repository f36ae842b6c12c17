"""``python bench/train_drafter.py``: data, training, and the files of a drafter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM

from bench.drafter_training.data import Text, Texts, answers, cut_into_texts, own_questions, read_questions
from bench.drafter_training.head import HeadLearner, TrainedHead, read_layers, shape_of
from bench.drafter_training.layers import LayersLearner, TrainedLayers
from bench.drafter_training.lessons import Learner, require_plain_ends
from bench.drafter_training.precision import fast_dtype
from bench.drafter_training.states import StateFile
from bench.drafter_training.trainer import Options, Trainer
from bench.training.corpus import read_files
from pearl.models import Tokenizer, bundled_path


def main(
    out: Annotated[Path, typer.Argument(help="Folder for answers, checkpoint, report.json, and the head itself")],
    target: Annotated[str, typer.Option(help="Folder of the target; default: the bundled one")] = "",
    layers: Annotated[int, typer.Option(min=0, help="Of the target, to make a draft model of; 0: an EAGLE-3 head")] = 0,
    prompts: Annotated[list[Path] | None, typer.Option(help="JSON lines with questions for a chat model")] = None,
    own: Annotated[int, typer.Option("--own-questions", help="Questions that a chat model asks itself")] = 0,
    files: Annotated[int, typer.Option(help="Files of the standard library to learn from as text; 0: none")] = 200,
    answer_count: Annotated[int, typer.Option("--answers", help="Answers of the target to learn from")] = 2000,
    answer_tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most")] = 192,
    temperature: Annotated[float, typer.Option(help="That the answers are drawn at")] = 0.7,
    vocab: Annotated[int, typer.Option(help="Ids that can be drafted: the most frequent ones")] = 8192,
    ffn: Annotated[int, typer.Option(help="Feed-forward width of the head; 0: the target's")] = 0,
    minutes: Annotated[float, typer.Option(help="Of training, restarts included")] = 60,
    most_steps: Annotated[int, typer.Option(help="Stop after so many; 0: never")] = 0,
    sequence: Annotated[int, typer.Option(help="Tokens of a text, at most")] = 256,
    rows: Annotated[int, typer.Option(help="Texts of a step")] = 4,
    steps: Annotated[int, typer.Option(min=1, max=8, help="Tokens that a head's window is rolled out to")] = 5,
    learn_vocabulary: Annotated[
        bool, typer.Option(help="Learn a head's last matrix too, of much data; else it stays the target's")
    ] = False,
    lr: float = 1e-3,
    held_out: Annotated[int, typer.Option(help="Texts that a report looks at, at most")] = 64,
) -> None:
    """Train an EAGLE-3 head or a draft model for a target, and write it as ``draft=`` takes it."""
    console, path = Console(), target or str(bundled_path("target"))
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = Tokenizer.from_pretrained(path)
    judge = AutoModelForCausalLM.from_pretrained(path, dtype=fast_dtype(device), trust_remote_code=False)
    if layers > judge.config.num_hidden_layers:
        raise typer.BadParameter(f"--layers {layers}: the target has {judge.config.num_hidden_layers}")
    require_plain_ends(judge)
    states = StateFile(out, judge, [] if layers else [*read_layers(judge), judge.config.num_hidden_layers])
    pieces = cut_into_texts(tokenizer, list(read_files()[0].values())[:files], sequence)
    questions = [text for file in prompts or [] for text in read_questions(file)]
    if own:
        questions += own_questions(path, tokenizer, out / "questions.jsonl", own, sequence // 2, console)
    asked = _asked(tokenizer, questions, pieces, answer_count, sequence // 2)
    tell = partial(_keep, states, sequence) if layers else None
    written = answers(path, asked, out / "answers.jsonl", answer_tokens, temperature, console, tell)
    mixed = [*written, *pieces]
    order = np.random.default_rng(0).permutation(len(mixed))
    texts = Texts((mixed[index] for index in order), sequence)
    kept = _drafted_ids(texts, tokenizer, vocab)
    embeddings = judge.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    drafter: TrainedHead | TrainedLayers
    learner: Learner
    if layers:
        drafter = TrainedLayers(judge, layers, kept)
        learner = LayersLearner(drafter, embeddings, states, device)
    else:
        drafter = TrainedHead(shape_of(judge, len(kept), ffn), judge, kept)
        drafter.lm_head.requires_grad_(learn_vocabulary)
        learner = HeadLearner(drafter, embeddings, states, device)
    trainer = Trainer(learner, texts, out, Options(device, rows, steps, lr, held_out))
    trainer.restore()
    console.print(f"{len(texts.train)} texts, {len(texts.held_out)} held out; {len(kept)} ids to draft; {device}")
    before = trainer.worth() if not trainer.step else None
    trainer.fit(minutes, console, most_steps)
    drafter.save(out / ("draft" if layers else "head"))
    report = {"steps": trainer.step, "seconds": trainer.elapsed, "held_out": asdict(trainer.worth()),
              **({"before": asdict(before)} if before is not None else {})}  # fmt: skip
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    console.print(report)


def _keep(states: StateFile, length: int, text: Text, top: Sequence[Sequence[tuple[int, float]]]) -> None:
    """As it is learnt from: of a text's first tokens."""
    if len(text.ids[:length]) > text.begin:
        states.add_likeliest(Text(text.ids[:length], text.begin), top)


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

"""What a head learns from: the target's own answers, and local text; a part of both is held out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pearl import LLM, SamplingParams
from pearl.models import Tokenizer

_HELD_OUT = 20  # of so many texts one is


@dataclass(frozen=True)
class Text:
    """``begin``: of the tokens that count; what stands before is the prompt."""

    ids: tuple[int, ...]
    begin: int


@dataclass(frozen=True)
class Batch:
    ids: Tensor  # int64 [B, T], padded with 0
    counts: Tensor  # bool [B, T], tokens to be predicted


class Texts:
    def __init__(self, texts: Iterable[Text], length: int) -> None:
        """Longer ones are cut to ``length`` tokens."""
        cut = [Text(text.ids[:length], text.begin) for text in texts if len(text.ids) > 8 and text.begin < length - 4]
        self.train = [text for index, text in enumerate(cut) if index % _HELD_OUT]
        self.held_out = [text for index, text in enumerate(cut) if not index % _HELD_OUT]

    def frequencies(self) -> Counter[int]:
        """Of the tokens of answers and texts that are learnt from."""
        counts: Counter[int] = Counter()
        for text in self.train:
            counts.update(text.ids[text.begin :])
        return counts

    def sample(self, rng: np.random.Generator, rows: int) -> Batch:
        return _batch([self.train[index] for index in rng.integers(0, len(self.train), rows)])

    def held_out_batches(self, rows: int, most: int) -> Iterator[Batch]:
        for begin in range(0, min(most, len(self.held_out)), rows):
            yield _batch(self.held_out[begin : begin + rows])


def _batch(texts: Sequence[Text]) -> Batch:
    longest = max(len(text.ids) for text in texts)
    ids, counts = (
        torch.zeros(len(texts), longest, dtype=torch.int64),
        torch.zeros(len(texts), longest, dtype=torch.bool),
    )
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        counts[row, text.begin : len(text.ids)] = True
    return Batch(ids, counts)


def read_questions(path: Path) -> list[str]:
    """From JSON lines: the ``prompt``, ``question`` or first of the ``turns`` of each."""
    found = []
    for line in path.read_text("utf-8").splitlines():
        fields = json.loads(line) if line.strip() else {}
        text = fields.get("prompt") or fields.get("question") or next(iter(fields.get("turns") or ()), None)
        if isinstance(text, str) and text:
            found.append(text)
    return found


def cut_into_texts(tokenizer: Tokenizer, files: Sequence[str], length: int) -> list[Text]:
    """All of them, in pieces."""
    pieces = []
    for text in files:
        ids = tokenizer.encode(text)
        pieces += [Text(tuple(ids[i : i + length]), 1) for i in range(0, len(ids), length)]
    return pieces


def answers(
    target: str, prompts: Sequence[Sequence[int]], file: Path, tokens: int, temperature: float, console: Console
) -> list[Text]:
    """The target's to each prompt, of ``tokens`` at most. ``file`` keeps those that there are already."""
    known = file.read_text("utf-8").splitlines() if file.exists() else []
    texts = [Text(tuple(fields["ids"]), fields["begin"]) for fields in map(json.loads, known)]
    if len(texts) < len(prompts):
        console.print(f"{len(texts)} of {len(prompts)} answers are there; the target writes the others")
        with LLM(target=target, method="autoregressive", seed=1) as llm, file.open("a", encoding="utf-8") as out:
            for begin in range(len(texts), len(prompts), 64):
                part = [list(prompt) for prompt in prompts[begin : begin + 64]]
                outputs = llm.generate(part, SamplingParams(temperature=temperature, max_tokens=tokens))
                for prompt, output in zip(part, outputs, strict=True):
                    texts.append(Text((*prompt, *output.outputs[0].token_ids), len(prompt)))
                    out.write(json.dumps({"ids": texts[-1].ids, "begin": len(prompt)}) + "\n")
                out.flush()
                console.print(f"{len(texts)} of {len(prompts)} answers")
    return texts[: len(prompts)]

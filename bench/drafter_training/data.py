"""What a drafter learns from: the target's own answers, and local text; a part of both is held out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from rich.console import Console

from pearl import LLM, SamplingParams
from pearl.bench.measure import answered
from pearl.models import Tokenizer

_HELD_OUT = 20  # of so many texts one is
_TOLD = 20  # of the likeliest tokens in each place of an answer
_SHORTEST = 8  # tokens of an answer; a rollout is no longer
_AT_ONCE = 256  # prompts that the target is given together
_SEQUENCES = 64  # that it writes at a time
_CONTENT = "\x00content\x00"  # of a turn, to find where it begins


@dataclass(frozen=True)
class Text:
    """``begin``: of the tokens that count; what stands before is the prompt."""

    ids: tuple[int, ...]
    begin: int


Tell = Callable[[Text, Sequence[Sequence[tuple[int, float]]]], None]


class Texts:
    def __init__(self, texts: Iterable[Text], length: int) -> None:
        """Longer ones are cut to ``length`` tokens; those with an answer of a few tokens are left out."""
        cut = [Text(text.ids[:length], text.begin) for text in texts]
        cut = [text for text in cut if len(text.ids) - text.begin > _SHORTEST]
        self.train = [text for index, text in enumerate(cut) if index % _HELD_OUT]
        self.held_out = [text for index, text in enumerate(cut) if not index % _HELD_OUT]

    def frequencies(self) -> Counter[int]:
        """Of the tokens of answers and texts that are learnt from."""
        counts: Counter[int] = Counter()
        for text in self.train:
            counts.update(text.ids[text.begin :])
        return counts

    def sample(self, rng: np.random.Generator, rows: int) -> list[Text]:
        return [self.train[index] for index in rng.integers(0, len(self.train), rows)]


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


def own_questions(
    target: str, tokenizer: Tokenizer, file: Path, count: int, tokens: int, console: Console
) -> list[str]:
    """What the target itself writes where a user's turn begins: questions of the kind that it was trained to answer
    (Magpie, arXiv 2406.08464). Drawn at temperature 1; those that do not end within ``tokens``, and repeated ones, are
    left out. ``file`` keeps them, and goes on where it was.
    """
    known = file.read_text("utf-8").splitlines() if file.exists() else []
    found = list(dict.fromkeys(json.loads(line)["question"] for line in known))
    if len(found) < count:
        text = tokenizer.chat_text([{"role": "user", "content": _CONTENT}])
        opening = tokenizer.encode_chat(text[: text.index(_CONTENT)])
        if not opening:
            raise typer.BadParameter("the chat template has nothing before a user's words; give --prompts")
        console.print(f"{len(found)} of {count} questions are there; the target writes the others")
        with (
            LLM(target=target, method="autoregressive", max_num_seqs=_SEQUENCES, seed=len(known)) as llm,
            file.open("a", encoding="utf-8") as out,
        ):
            while len(found) < count:
                asked = [opening] * _AT_ONCE
                outputs = answered(llm.generate(asked, SamplingParams(temperature=1.0, max_tokens=tokens)))
                texts = [o.outputs[0].text.strip() for o in outputs if o.outputs[0].finish_reason == "stop"]
                new = [text for text in dict.fromkeys(texts) if text and text not in found]
                if not new:
                    raise typer.BadParameter("the target writes no questions of its own; give --prompts")
                out.writelines(json.dumps({"question": text}) + "\n" for text in new)
                out.flush()
                found += new
                console.print(f"{len(found)} of {count} questions")
    return found[:count]


def answers(
    target: str,
    prompts: Sequence[Sequence[int]],
    file: Path,
    tokens: int,
    temperature: float,
    console: Console,
    tell: Tell | None = None,
) -> list[Text]:
    """The target's to each prompt, of ``tokens`` at most: every other one greedy, as answers mostly are asked for, the
    others at ``temperature``. ``file`` keeps those that there are already. ``tell``: hears of each new one what was
    likeliest in the place of each of its tokens.
    """
    known = file.read_text("utf-8").splitlines() if file.exists() else []
    texts = [Text(tuple(fields["ids"]), fields["begin"]) for fields in map(json.loads, known)]
    if len(texts) < len(prompts):
        console.print(f"{len(texts)} of {len(prompts)} answers are there; the target writes the others")
        with (
            LLM(target=target, method="autoregressive", max_num_seqs=_SEQUENCES, seed=len(texts)) as llm,
            file.open("a", encoding="utf-8") as out,
        ):
            for begin in range(len(texts), len(prompts), _AT_ONCE):
                part = [list(prompt) for prompt in prompts[begin : begin + _AT_ONCE]]
                heats = [temperature * (place % 2) for place in range(begin, begin + len(part))]
                told = None if tell is None else _TOLD
                params = [SamplingParams(temperature=heat, max_tokens=tokens, logprobs=told) for heat in heats]
                for prompt, output in zip(part, answered(llm.generate(part, params)), strict=True):
                    texts.append(Text((*prompt, *output.outputs[0].token_ids), len(prompt)))
                    if tell is not None:
                        tell(texts[-1], [one.top for one in output.outputs[0].logprobs or ()])
                    out.write(json.dumps({"ids": texts[-1].ids, "begin": len(prompt)}) + "\n")
                out.flush()
                console.print(f"{len(texts)} of {len(prompts)} answers")
    return texts[: len(prompts)]

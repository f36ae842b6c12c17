"""Engines as people run them, in one dtype: whether what is drafted, or computed in a batch, is what each decodes
plainly.

Every engine is compared with itself alone: its own plain greedy decoding, one prompt at a time, is its truth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.evaluation.entrants import Entrants
from bench.evaluation.setups import Setup, at, plain
from bench.roofline.generators import assistant, transformers_contenders
from pearl.devices import cpu_cores
from pearl.engine.model_pair import model_paths
from pearl.llm import LLM

Ids = list[list[int]]
Way = Callable[[Ids], Ids]  # continuations, of all prompts


@dataclass(frozen=True)
class Engine:
    """``ways``: to decode, by name; the first is plain."""

    name: str
    ways: Mapping[str, Way]


@dataclass(frozen=True)
class Agreement:
    engine: str
    way: str
    prompts: int
    equal: int
    tokens: int  # that are equal before the first difference, of all prompts


def agreements(engine: Engine, prompts: Ids) -> list[Agreement]:
    (_, first), *others = engine.ways.items()
    truth = first(prompts)
    found = []
    for name, way in others:
        outputs = way(prompts)
        common = [_common(a, b) for a, b in zip(truth, outputs, strict=True)]
        equal = sum(a == b for a, b in zip(truth, outputs, strict=True))
        found.append(Agreement(engine.name, name, len(prompts), equal, sum(common)))
    return found


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def ours(llm: LLM, setups: Sequence[Setup], batch: int, max_tokens: int) -> Engine:
    """Every method alone and in batches. ``llm``: with room for a batch."""
    entrants = Entrants(llm)

    def way(setup: Setup) -> Way:
        def decode(prompts: Ids) -> Ids:
            groups = [prompts[i : i + setup.batch] for i in range(0, len(prompts), setup.batch)]
            return [ids for group in groups for ids in entrants.answer(setup, group, max_tokens).outputs]

        return decode

    ways = {}
    for load in (1, batch):
        for setup in (plain(), *setups):
            one = at(setup, load)
            ways[one.name] = way(one)
    return Engine("pearl", ways)


def transformers(llm: LLM, max_tokens: int, batch: int) -> Engine:
    """``generate``, assisted by the draft model or by prompt lookup, and in padded batches."""
    target, draft = model_paths(llm.config)
    plain_one, assisted = transformers_contenders(llm, target, draft, [cpu_cores()])
    name = "prompt lookup" if assistant(draft) is None else "assisted"
    padded = PaddedBatches(target, llm, max_tokens, batch)
    return Engine("transformers", {
        "generate": lambda prompts: plain_one.generate(prompts, max_tokens).tokens,
        name: lambda prompts: assisted.generate(prompts, max_tokens).tokens,
        f"batch {batch}": padded.decode,
    })  # fmt: skip


class PaddedBatches:
    """``generate`` of several prompts at once, padded on the left."""

    def __init__(self, target: str, llm: LLM, max_tokens: int, batch: int) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(
            target, dtype=llm.models.target.model.dtype, trust_remote_code=False
        )
        self._eos, self._max_tokens, self._batch = sorted(llm.tokenizer.eos_ids), max_tokens, batch

    def decode(self, prompts: Ids) -> Ids:
        groups = [prompts[i : i + self._batch] for i in range(0, len(prompts), self._batch)]
        return [ids for group in groups for ids in self._group(group)]

    @torch.inference_mode()
    def _group(self, prompts: Ids) -> Ids:
        longest, pad = max(map(len, prompts)), min(self._eos, default=0)
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out = self._model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=self._max_tokens, eos_token_id=self._eos or None,
            pad_token_id=pad,
        )  # fmt: skip
        return [self._until_end(row) for row in out[:, longest:].tolist()]

    def _until_end(self, ids: list[int]) -> list[int]:
        return next((ids[: i + 1] for i, token in enumerate(ids) if token in self._eos), ids)

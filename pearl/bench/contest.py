"""Contenders on one pair, batch after batch, and the prompts that they get."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pearl.bench.contenders import Contender
from pearl.bench.measure import MethodResult, compare
from pearl.bench.prompt_sets import load_prompts
from pearl.bench.scripted_verdicts import scripted
from pearl.bench.shapes import SHAPES, load_shapes, random_prompts
from pearl.config import EngineConfig
from pearl.engine.model_loading import load_models
from pearl.llm import LLM, Prompt
from pearl.models import Tokenizer, bundled_path
from pearl.sampling_params import SamplingParams

_MAX_WINDOW = EngineConfig().max_window


def read_prompts(dataset: str, count: int, pair: tuple[str, str] | None, length: int | None) -> list[Prompt]:
    """The data set's texts; for random weights token ids, as many as the bundled pair's tokenizer makes of a text."""
    if pair is None:
        return [*load_prompts(dataset, count)]
    if length is None:
        tokenizer = Tokenizer.from_pretrained(str(bundled_path("target")))
        lengths = [len(tokenizer.encode(text)) for text in load_prompts(dataset, count)]
    else:
        lengths = [length] * count
    return [*random_prompts(lengths, min(SHAPES[name].vocab_size for name in pair))]


def check_contenders(contenders: Sequence[Contender], options: Mapping[str, Any], batches: Sequence[int]) -> None:
    """ConfigurationError if one cannot be. Nothing is loaded."""
    for batch in batches:
        for contender in contenders:
            EngineConfig(**{**options, **contender.options, "max_num_seqs": batch})


@dataclass(frozen=True)
class Contest:
    """On one pair, which is loaded once. ``shapes``: of random weights.

    prompts: a batch gets the first ``count`` of them, repeated in turn if there are fewer; one larger than 1 at least
    ``waves`` times as many as it is large: at the end fewer run.
    """

    contenders: Sequence[Contender]
    options: Mapping[str, Any]
    batches: Sequence[int]
    prompts: Sequence[Prompt]
    count: int
    waves: int
    params: SamplingParams
    repeats: int
    shapes: tuple[str, str] | None = None
    acceptance: float | None = None

    def prompts_of(self, batch: int) -> list[Prompt]:
        least = self.waves * batch if batch > 1 else 1
        return [*islice(cycle(self.prompts), max(least, min(self.count, len(self.prompts))))]

    def run(self, console: Console, ended: Callable[[list[MethodResult]], None]) -> list[MethodResult]:
        """``ended`` as in ``compare``, with the results of all batches."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        steps = sum(len(self.prompts_of(batch)) + 1 for batch in self.batches)
        results: list[MethodResult] = []
        with Progress(*columns, console=console, refresh_per_second=2) as progress:  # drawing costs the engine time
            task = progress.add_task("loading", total=len(self.contenders) * self.repeats * steps)
            with self._load() as first:
                for batch in self.batches:

                    def advance(name: str, batch: int = batch) -> None:
                        progress.update(task, advance=1, description=f"batch {batch}, {name}")

                    def run_ended(new: list[MethodResult], before: Sequence[MethodResult] = tuple(results)) -> None:
                        ended([*before, *new])

                    results += self._compete(first, batch, advance, run_ended)
        return results

    def _compete(
        self, first: LLM, batch: int, advance: Callable[[str], None], ended: Callable[[list[MethodResult]], None]
    ) -> list[MethodResult]:
        prompts = self.prompts_of(batch)
        # Scripted verdicts hang on the seed: with one for all, all requests would have the same luck.
        every = [replace(self.params, seed=index) for index in range(len(prompts))]
        params = self.params if self.acceptance is None else every
        with ExitStack() as stack:
            llms = {}
            for contender in self.contenders:
                llm = first.variant(**contender.options, max_num_seqs=batch, max_window=_MAX_WINDOW)
                stack.callback(llm.close)
                llms[contender.name] = llm
            return compare(llms, prompts, params, self.repeats, advance, ended, batch)

    def _config(self, **options: Any) -> EngineConfig:
        return EngineConfig(**{**self.options, **options})

    def _load(self) -> LLM:
        # "pearl" loads a draft whatever the contenders are; buffers must do for the largest of them.
        windows = [c.window for c in self.contenders if c.window != "auto"]
        options: dict[str, Any] = {
            "method": "pearl", "max_num_seqs": max(self.batches), "max_window": max([_MAX_WINDOW, *windows]),
        }  # fmt: skip
        if self.shapes is None and self.acceptance is None:
            return LLM(**self.options, **options)
        if self.shapes is None:
            config = self._config(**options)
            models = load_models(config)
        else:
            longest = max(map(len, self.prompts)) + self.params.max_tokens
            config = self._config(**options, max_model_len=longest)
            models = load_shapes(config, *self.shapes)
        wrap = None if self.acceptance is None else scripted(self.acceptance, models.vocab_size)
        return LLM.from_models(models, config, wrap_verifier=wrap)

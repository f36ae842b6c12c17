"""Methods that compete on one pair, and the prompts that they get."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pearl.bench.measure import MethodResult, compare
from pearl.bench.prompt_sets import load_prompts
from pearl.bench.scripted_verdicts import scripted
from pearl.bench.shapes import SHAPES, load_shapes, random_prompts
from pearl.config import EngineConfig
from pearl.engine.model_loading import load_models
from pearl.llm import LLM, Prompt
from pearl.models import Tokenizer, bundled_path
from pearl.sampling_params import SamplingParams


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


@dataclass(frozen=True)
class Contest:
    """Methods that compete on one pair, which is loaded once. ``shapes``: of random weights."""

    methods: Sequence[str]
    options: Mapping[str, Any]
    prompts: Sequence[Prompt]
    params: SamplingParams
    repeats: int
    shapes: tuple[str, str] | None = None
    acceptance: float | None = None

    def run(self, console: Console, ended: Callable[[list[MethodResult]], None]) -> list[MethodResult]:
        """``ended`` as in ``compare``."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                   TimeRemainingColumn())  # fmt: skip
        # Scripted verdicts hang on the seed: with one for all, all requests would have the same luck.
        every = [replace(self.params, seed=index) for index in range(len(self.prompts))]
        params = self.params if self.acceptance is None else every
        with Progress(*columns, console=console, refresh_per_second=2) as progress:  # drawing costs the engine time
            task = progress.add_task("loading", total=len(self.methods) * self.repeats * (len(self.prompts) + 1))
            with self._load() as first:
                contenders = {name: first.variant(method=name) for name in self.methods}
                try:
                    return compare(
                        contenders, self.prompts, params, self.repeats,
                        lambda name: progress.update(task, advance=1, description=name), ended,
                    )  # fmt: skip
                finally:
                    for llm in contenders.values():
                        llm.close()

    def _load(self) -> LLM:
        # "pearl" loads a draft whatever the methods are.
        if self.shapes is None and self.acceptance is None:
            return LLM(**self.options, method="pearl")
        if self.shapes is None:
            config = EngineConfig(**self.options, method="pearl")
            models = load_models(config)
        else:
            longest = max(map(len, self.prompts)) + self.params.max_tokens
            config = EngineConfig(**self.options, method="pearl", max_model_len=longest)
            models = load_shapes(config, *self.shapes)
        wrap = None if self.acceptance is None else scripted(self.acceptance, models.vocab_size)
        return LLM.from_models(models, config, wrap_verifier=wrap)

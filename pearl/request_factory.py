"""Requests of an engine: what a checked prompt and its parameters become."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection
from dataclasses import replace

from pearl.config import EngineConfig
from pearl.engine.model_loading import LoadedModels
from pearl.engine.output_processor import OutputProcessor
from pearl.engine.prompt_logprobs import PromptProgress
from pearl.engine.request import Request
from pearl.grammars import Grammar
from pearl.outputs import RequestMetrics
from pearl.sampling_params import SamplingParams


class RequestFactory:
    """Numbers requests, and gives each its seed and its way to text."""

    def __init__(self, config: EngineConfig, models: LoadedModels) -> None:
        self._config, self._models = config, models
        self.made = 0  # requests so far; their ids are 1 to ``made``

    def requests(
        self, ids: list[int], params: SamplingParams, grammar: Grammar | None, shown: Collection[int] = ()
    ) -> list[Request]:
        """One for each output of a prompt. ``shown``: special tokens whose names are part of the text."""
        if self._models.head is not None and self._is_pinned(params):
            # What a head drafts depends on how far the target was. The target's own draws are those of ``coupled``.
            params = replace(params, draft=False)
        seed = self._seed(params)
        requests = [self._request(ids, params, seed + index, grammar, shown) for index in range(params.n)]
        if params.prompt_logprobs is not None:
            requests[0].prompt_logprobs = PromptProgress(ids, params.prompt_logprobs)
        return requests

    def _request(
        self, ids: list[int], params: SamplingParams, seed: int, grammar: Grammar | None, shown: Collection[int]
    ) -> Request:
        max_tokens = min(params.max_tokens, self._models.max_model_len - len(ids))
        tokenizer = self._models.tokenizer
        hidden = tokenizer.special_texts
        if shown:
            hidden = {token: text for token, text in hidden.items() if token not in shown}
        detokenizer = tokenizer.detokenizer(ids, shown)
        output = OutputProcessor(detokenizer, params, max_tokens, tokenizer.eos_ids, hidden)
        metrics = RequestMetrics(arrival=time.monotonic())
        self.made += 1
        pinned = self._is_pinned(params)
        rekeys = self._config.verification == "block" and params.temperature > 0 and not pinned
        return Request(
            self.made, params, seed, list(ids), len(ids), max_tokens, output, metrics, pinned, rekeys, grammar
        )

    def _is_pinned(self, params: SamplingParams) -> bool:
        """Whether a seed must give an output again, whose draws depend on how each token is decided."""
        seeded = params.seed is not None or self._config.seed is not None
        return seeded and params.draft and params.temperature > 0 and self._config.verification != "coupled"

    def _seed(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        # Requests without a seed differ from each other, and between runs unless the engine has one.
        return secrets.randbits(63) if self._config.seed is None else self._config.seed + (self.made << 20)

"""The library's front door."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from types import TracebackType
from typing import Any

from pearl.config import EngineConfig
from pearl.engine.builder import connect
from pearl.engine.engine import RoundRecord
from pearl.engine.judge import Judge
from pearl.engine.model_loading import LoadedModels, load_models
from pearl.engine.output_processor import OutputProcessor
from pearl.engine.request import Request
from pearl.errors import ConfigurationError, InvalidRequestError
from pearl.outputs import CompletionOutput, OutputDelta, RequestMetrics, RequestOutput, StreamChunk
from pearl.sampling_params import SamplingParams

Prompt = str | Sequence[int]
WrapVerifier = Callable[[Judge], Judge]


class LLM:
    """A target model with a draft model that makes it faster, and never different.

    Keyword arguments are the fields of ``pearl.config.EngineConfig``; both models default to the bundled pair.
    ``observer`` is called with a RoundRecord after every round. One thread at a time may use an LLM. It is a context
    manager; ``close`` ends the worker threads.
    """

    def __init__(
        self,
        target: str | None = None,
        draft: str | None = None,
        *,
        observer: Callable[[RoundRecord], None] | None = None,
        **options: Any,
    ) -> None:
        known = EngineConfig.__dataclass_fields__
        if unknown := sorted(set(options) - set(known)):
            raise ConfigurationError(f"unknown options {unknown}; known are {sorted(known)}")
        config = EngineConfig(target=target, draft=draft, **options)
        self._own(load_models(config), config, observer, None)

    @classmethod
    def from_models(
        cls,
        models: LoadedModels,
        config: EngineConfig,
        observer: Callable[[RoundRecord], None] | None = None,
        wrap_verifier: WrapVerifier | None = None,
    ) -> LLM:
        """Around models that were built elsewhere, with the same config; closing the LLM closes them.

        ``wrap_verifier`` gets the verifier and returns what the engine uses in its place.
        """
        llm = cls.__new__(cls)
        llm._own(models, config, observer, wrap_verifier)
        return llm

    def _own(
        self,
        models: LoadedModels,
        config: EngineConfig,
        observer: Callable[[RoundRecord], None] | None,
        wrap_verifier: WrapVerifier | None,
    ) -> None:
        self._owned: LoadedModels | None = models
        try:
            self._connect(config, models, observer, wrap_verifier)
        except BaseException:
            models.close()
            raise

    def _connect(
        self,
        config: EngineConfig,
        models: LoadedModels,
        observer: Callable[[RoundRecord], None] | None,
        wrap_verifier: WrapVerifier | None,
    ) -> None:
        self.config, self.models, self._wrap_verifier = config, models, wrap_verifier
        self.engine = connect(config, models, observer, wrap_verifier)
        self.tokenizer, self.max_model_len = models.tokenizer, models.max_model_len
        self._next_id = 0
        self._mail: dict[int, deque[OutputDelta]] = {}  # by request: committed by the engine, not yet read

    def variant(self, observer: Callable[[RoundRecord], None] | None = None, **changes: Any) -> LLM:
        """Another LLM around the same weights and KV memory, with some options changed: to compare methods.

        Only one of the two may be generating at a time, and both must have been built with prefix_caching=False
        (ConfigurationError), because each would find the other's keys in pages that it believes to know.
        """
        config = replace(self.config, **changes)
        if self.config.prefix_caching or config.prefix_caching:
            raise ConfigurationError("variants share KV memory; build the first LLM with prefix_caching=False")
        other = LLM.__new__(LLM)
        other._owned = None
        other._connect(config, self.models, observer, self._wrap_verifier)
        return other

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_output: Callable[[OutputDelta], None] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; returns one RequestOutput for each, in order.

        prompts: text or token ids, one or a list. params: one for all, or one for each prompt.
        on_output sees each step's additions to these outputs. If the engine fails, the outputs that it could not end
        say so in ``error``. All prompts are checked before any work starts
        (InvalidRequestError); an interruption (Ctrl-C) drops what this call started and leaves the LLM usable.
        """
        batch = _as_list(prompts)
        every = _params_for(batch, params)
        outputs, owners = self._submit_all(batch, every)
        with closing(self._follow(owners)) as deltas:
            for delta in deltas:
                owners[delta.request_id].extend(delta)
                if on_output is not None:
                    on_output(delta)
        return outputs

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[StreamChunk, None, None]:
        """Yield text as it is committed; never a token that could still be taken back. Closing it aborts the request.

        The prompt is checked at the call; the request is queued when the first chunk is asked for. Streams may be
        read in turn, and ``generate`` be called between their chunks: each gets its own tokens.
        """
        params = params or SamplingParams()
        self._check_ids(params)
        return self._stream(self.encode(prompt), params)

    def _stream(self, prompt: list[int], params: SamplingParams) -> Generator[StreamChunk, None, None]:
        _, owners = self._submit_all([prompt], [params])
        with closing(self._follow(owners)) as deltas:
            for d in deltas:
                index = owners[d.request_id].index
                yield StreamChunk(
                    index, d.text, d.token_ids, d.drafted, d.finish_reason, d.metrics, d.error, d.logprobs
                )

    def _follow(self, owners: dict[int, CompletionOutput]) -> Generator[OutputDelta, None, None]:
        """Run the engine until these requests have ended; yields what is theirs, keeps the rest for its own readers.

        Closing it aborts what has not ended.
        """
        try:
            for request_id in owners:
                self._mail[request_id] = deque()
            while True:
                for request_id in owners:
                    while self._mail[request_id]:
                        yield self._mail[request_id].popleft()
                if not any(request_id in self.engine.scheduler.requests for request_id in owners):
                    return
                for delta in self.engine.step():
                    if delta.request_id in self._mail:
                        self._mail[delta.request_id].append(delta)
        finally:
            for request_id in owners:
                self._mail.pop(request_id, None)
            self._abort(owners)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, checked: not empty, known ids, shorter than the context."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise InvalidRequestError("the prompt is empty; give at least one token")
        if bad := [i for i in ids if not isinstance(i, int) or not 0 <= i < self.tokenizer.vocab_size]:
            raise InvalidRequestError(f"token id {bad[0]!r} is outside the vocabulary [0, {self.tokenizer.vocab_size})")
        if len(ids) >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {len(ids)} tokens, the context holds {self.max_model_len} with at least one token of "
                "output; shorten the prompt or raise max_model_len"
            )
        return ids

    def _submit_all(
        self, prompts: Sequence[Prompt], every: Sequence[SamplingParams]
    ) -> tuple[list[RequestOutput], dict[int, CompletionOutput]]:
        """Check everything, then queue everything. ``owners`` maps request ids to the outputs that they fill."""
        for params in every:
            self._check_ids(params)
        encoded = [self.encode(prompt) for prompt in prompts]
        outputs: list[RequestOutput] = []
        owners: dict[int, CompletionOutput] = {}
        try:
            for prompt, ids, params in zip(prompts, encoded, every, strict=True):
                seed = self._seed(params)
                completions = [CompletionOutput(index) for index in range(params.n)]
                for completion in completions:
                    request = self._request(ids, params, seed + completion.index)
                    completion.metrics = request.metrics
                    self.engine.add(request)
                    owners[request.id] = completion
                outputs.append(RequestOutput(prompt if isinstance(prompt, str) else None, ids, completions))
        except BaseException:
            self._abort(owners)
            raise
        return outputs, owners

    def _request(self, ids: list[int], params: SamplingParams, seed: int) -> Request:
        max_tokens = min(params.max_tokens, self.max_model_len - len(ids))
        output = OutputProcessor(
            self.tokenizer.detokenizer(ids), params, max_tokens, self.tokenizer.eos_ids, self.tokenizer.special_texts
        )
        metrics = RequestMetrics(arrival=time.monotonic())
        self._next_id += 1
        return Request(self._next_id, params, seed, list(ids), len(ids), max_tokens, output, metrics)

    def _seed(self, params: SamplingParams) -> int:
        if params.seed is not None:
            return params.seed
        # Requests without a seed differ from each other, and between runs unless the engine has one.
        return secrets.randbits(63) if self.config.seed is None else self.config.seed + (self._next_id << 20)

    def _check_ids(self, params: SamplingParams) -> None:
        for name, ids in (("logit_bias", params.logit_bias or ()), ("stop_token_ids", params.stop_token_ids or ())):
            for token in ids:
                if not isinstance(token, int) or not 0 <= token < self.tokenizer.vocab_size:
                    raise InvalidRequestError(
                        f"{name} names token {token!r}, outside the vocabulary [0, {self.tokenizer.vocab_size})"
                    )

    def _abort(self, request_ids: Iterable[int]) -> None:
        for request_id in request_ids:
            if request_id in self.engine.scheduler.requests:
                self.engine.abort(request_id)

    def close(self) -> None:
        self.engine.close()
        if self._owned is not None:
            self._owned.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and all(isinstance(token, int) for token in prompts)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params_for(batch: list[Prompt], params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * len(batch)
    if len(params) != len(batch):
        raise InvalidRequestError(f"{len(batch)} prompts but {len(params)} SamplingParams; give one, or one for each")
    return list(params)

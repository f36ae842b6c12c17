"""The library's front door."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from os import PathLike
from types import TracebackType
from typing import Any

from pearl.admission import Admission, AnyParams, params_for
from pearl.chat_messages import Message, read_conversation, read_conversations
from pearl.config import EngineConfig
from pearl.drafting import Drafter
from pearl.driver import Driver, Reader
from pearl.engine.builder import connect
from pearl.engine.judge import Judge
from pearl.engine.model_loading import LoadedModels, load_models
from pearl.engine.request import Request
from pearl.engine.rounds import RoundRecord
from pearl.errors import ConfigurationError, InvalidRequestError
from pearl.gate import Gate, Turn
from pearl.grammars import Grammar
from pearl.outputs import CompletionOutput, OutputDelta, RequestOutput
from pearl.prompts import AnyPrompts, ReadPrompt, read_prompts
from pearl.request_factory import RequestFactory
from pearl.sampling_params import SamplingParams
from pearl.stream import Stream
from pearl.user_values import shown

Prompt = str | Sequence[int]
WrapVerifier = Callable[[Judge], Judge]
WrapDrafter = Callable[[Drafter], Drafter]


class LLM:
    """A target model with a draft model that makes it faster, and never different.

    Keyword arguments are the fields of ``pearl.config.EngineConfig``; both models default to the bundled pair.
    ``observer`` is called with a RoundRecord after every round. One thread at a time may use an LLM, of the process
    that built it: others get EngineInUseError, a forked process EngineClosedError. It is a context manager; ``close``
    ends the worker threads.
    """

    def __init__(
        self,
        target: str | PathLike[str] | None = None,
        draft: str | PathLike[str] | None = None,
        *,
        observer: Callable[[RoundRecord], None] | None = None,
        **options: Any,
    ) -> None:
        config = EngineConfig.from_options({"target": target, "draft": draft, **options})
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
            self._connect(config, models, observer, wrap_verifier, None, Gate())
        except BaseException:
            models.close()
            raise

    def _connect(
        self,
        config: EngineConfig,
        models: LoadedModels,
        observer: Callable[[RoundRecord], None] | None,
        wrap_verifier: WrapVerifier | None,
        wrap_drafter: WrapDrafter | None,
        gate: Gate,
    ) -> None:
        self.config, self.models, self._wrap_verifier = config, models, wrap_verifier
        self.engine = connect(config, models, observer, wrap_verifier, wrap_drafter)
        self.tokenizer, self.max_model_len = models.tokenizer, models.max_model_len
        self._driver = Driver(self.engine, gate)
        self._admission = Admission(models.tokenizer, models.vocab_size, models.max_model_len)
        self._factory = RequestFactory(config, models)

    def variant(
        self,
        observer: Callable[[RoundRecord], None] | None = None,
        wrap_verifier: WrapVerifier | None = None,
        wrap_drafter: WrapDrafter | None = None,
        **changes: Any,
    ) -> LLM:
        """Another LLM around the same weights and KV memory, with some options changed: to compare methods.

        ``wrap_verifier``: as for ``from_models``, None: as this LLM's. ``wrap_drafter`` gets the drafter that the
        options name and returns what proposes tokens in its place.
        Only one of the two may be generating at a time, and both must have been built with prefix_caching=False
        (ConfigurationError), because each would find the other's keys in pages that it believes to know.
        """
        config = EngineConfig.from_options({**vars(self.config), **changes})
        if self.config.prefix_caching or config.prefix_caching:
            raise ConfigurationError("variants share KV memory; build the first LLM with prefix_caching=False")
        other = LLM.__new__(LLM)
        other._owned = None
        wrap_verifier = wrap_verifier or self._wrap_verifier
        other._connect(config, self.models, observer, wrap_verifier, wrap_drafter, self._driver.gate)
        return other

    def generate(
        self,
        prompts: AnyPrompts,
        params: AnyParams = None,
        on_output: Callable[[OutputDelta], None] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; returns one RequestOutput for each, in order.

        prompts: text or token ids, one or several; ``pearl.prompts`` tells all their forms. params: one for all, or
        one for each prompt.
        on_output sees each step's additions to these outputs. If the engine fails, the outputs that it could not end
        say so in ``error``. All prompts are checked before any work starts
        (InvalidRequestError), and that there is room for all of them: max_num_seqs run at once and max_waiting may
        wait (QueueFullError); an interruption (Ctrl-C) drops what this call started and leaves the LLM usable.
        """
        if on_output is not None and not callable(on_output):
            raise InvalidRequestError(f"on_output must be a function, not {shown(on_output)}")
        batch = read_prompts(prompts)
        every = params_for(len(batch), params)
        unique = {id(one): one for one in every}
        for one in unique.values():
            self._admission.check(one)
        grammars = {key: self._admission.grammar(one) for key, one in unique.items()}
        self.engine.scheduler.require_room(sum(one.n for one in every))
        encoded = self._admission.encode_all(batch)
        reader, outputs = Reader(), []
        completions: dict[int, CompletionOutput] = {}  # by request id
        with self._driver.gate.enter() as turn:
            try:
                requests: list[Request] = []
                for prompt, ids, one in zip(batch, encoded, every, strict=True):
                    mine = self._factory.requests(ids, one, grammars[id(one)])
                    own = [CompletionOutput(index, metrics=request.metrics) for index, request in enumerate(mine)]
                    outputs.append(RequestOutput(prompt.text, ids, own))
                    completions.update(zip((request.id for request in mine), own, strict=True))
                    requests += mine
                self._driver.submit(reader, requests)
                self._read(reader, turn, completions, on_output)
            finally:
                self._driver.drop(reader, turn.inside)
        return outputs

    def _read(
        self,
        reader: Reader,
        turn: Turn,
        completions: Mapping[int, CompletionOutput],
        on_output: Callable[[OutputDelta], None] | None,
    ) -> None:
        """Run the engine until the reader's requests have ended."""
        while reader.unfinished:
            turn.checkpoint()
            self._driver.round()
            while reader.mail:
                delta = reader.mail.popleft()
                completions[delta.request_id].extend(delta)
                if on_output is not None:
                    turn.outside(on_output, delta)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: AnyParams = None,
        on_output: Callable[[OutputDelta], None] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list; otherwise as ``generate``.

        messages: {"role", "content"} each (``pearl.chat_messages``), rendered by the model's chat template, which gets
        ``chat_template_kwargs`` too. InvalidRequestError if there is no template or it refuses them.
        """
        rendered = [self.tokenizer.render_chat(m, chat_template_kwargs) for m in read_conversations(messages)]
        return self.generate([ReadPrompt(token_ids=ids) for ids in rendered], params, on_output)

    def stream(self, prompt: AnyPrompts, params: SamplingParams | None = None) -> Stream:
        """Yield text as it is committed; never a token that could still be taken back. Closing it aborts the request.

        The prompt, one in any of ``generate``'s forms, is checked at the call; the request is queued when the first
        chunk is asked for. Streams may be read in turn, and ``generate`` be called between their chunks: each gets its
        own tokens.
        """
        (one,) = params_for(1, params)
        self._admission.check(one)
        ids = self.encode(prompt)
        return Stream(self._driver, partial(self._factory.requests, ids, one, self._admission.grammar(one)))

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Stream:
        """The answer to one conversation, as ``chat`` gives it and ``stream`` yields it."""
        ids = self.tokenizer.render_chat(read_conversation(messages), chat_template_kwargs)
        return self.stream(ReadPrompt(token_ids=ids), params)

    def encode(self, prompt: AnyPrompts) -> list[int]:
        """Token ids of a prompt, checked: not empty, known ids, shorter than the context."""
        return self._admission.encode(prompt)

    def grammar(self, params: SamplingParams) -> Grammar | None:
        """Compile what ``params.structured`` asks for, for ``prepare``; on any thread. InvalidRequestError."""
        return self._admission.grammar(params)

    @property
    def driver(self) -> Driver:
        """For who runs the rounds himself (``pearl.serving``), inside a turn at its gate."""
        return self._driver

    def prepare(
        self,
        prompt: AnyPrompts,
        params: SamplingParams,
        *,
        grammar: Grammar | None = None,
        shown: Collection[int] = (),
    ) -> list[Request]:
        """Requests for ``driver``, one for each output of a prompt: checked (InvalidRequestError), not queued yet.

        ``grammar``: as ``LLM.grammar`` gives it for these parameters; None: it is compiled now, if there is one.
        ``shown``: special tokens whose names are part of the text.
        """
        (one,) = params_for(1, params)
        self._admission.check(one)
        requests = self._factory.requests(self.encode(prompt), one, grammar or self._admission.grammar(one), shown)
        self.engine.scheduler.require_fits(requests[0])
        return requests

    def close(self) -> None:
        """End what runs, the workers and their threads; streams are told so. Idempotent, and nothing in a fork.

        Raises EngineInUseError while another thread uses the LLM.
        """
        if not self._driver.gate.is_ours:
            return
        with self._driver.gate.enter():
            self._driver.close()
            if self._owned is not None:
                self._owned.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

"""Texts and token ids for the event loop, which must not wait for a long one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from pearl.chat_messages import read_conversation
from pearl.errors import InvalidRequestError
from pearl.grammars import Grammar
from pearl.llm import LLM
from pearl.prompts import ReadPrompt
from pearl.sampling_params import SamplingParams
from pearl.serving.protocol import TemplateFields

T = TypeVar("T")
_NOT_OF_TEMPLATES = ("chat_template", "documents", "tokenize", "tools")  # a client's template is code of a stranger's
_TEXT_END = 128
_SHORT = 2048  # characters, or ids: less than a switch to another thread may take


class Conversation(NamedTuple):
    """As a prompt. ``end``: the last characters of its text."""

    ids: list[int]
    end: str


class Texts:
    """One thread for what takes long: tokenizers are not made for several at a time."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self._tokenizer = llm, llm.tokenizer
        self._thread = ThreadPoolExecutor(1, "pearl-texts")

    async def prompt(self, prompt: str | Sequence[int], add_special_tokens: bool, name: str) -> list[int]:
        """Token ids of a prompt, checked as the library checks it. InvalidRequestError, about ``name``."""

        def encode() -> list[int]:
            if not isinstance(prompt, str):
                read = ReadPrompt(token_ids=list(prompt))
            elif add_special_tokens:
                read = ReadPrompt(text=prompt)
            else:
                read = ReadPrompt(token_ids=self._tokenizer.encode(prompt, add_special_tokens=False))
            return self._llm.encode(read)

        return await self.run(_naming(name, encode), len(prompt))

    async def conversation(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> Conversation:
        """Likewise, by the chat template; ``variables`` are for it. InvalidRequestError, about "messages"."""

        def encode() -> Conversation:
            text = self._tokenizer.chat_text(read_conversation(messages), variables)
            ids = self._llm.encode(ReadPrompt(token_ids=self._tokenizer.encode_chat(text)))
            return Conversation(ids, text[-_TEXT_END:])

        return await self.run(_naming("messages", encode))

    async def ids(self, text: str, add_special_tokens: bool) -> list[int]:
        """Of any text, also an empty one, and one that is too long for a prompt."""
        return await self.run(_naming("prompt", lambda: self._tokenizer.encode(text, add_special_tokens)), len(text))

    async def conversation_ids(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[int]:
        """Of any conversation, also one that is too long for a prompt."""
        return await self.run(_naming("messages", lambda: self._rendered(messages, variables)))

    def _rendered(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> list[int]:
        return self._tokenizer.render_chat(read_conversation(messages), variables)

    async def decode(self, ids: Sequence[int]) -> str:
        """InvalidRequestError for ids that are none."""
        size = max(self._llm.models.vocab_size, self._tokenizer.vocab_size)
        for token in ids:
            if not 0 <= token < size:
                raise InvalidRequestError(f"tokens: {token} is outside the vocabulary [0, {size})", "tokens")
        return await self.run(lambda: self._tokenizer.decode(ids), len(ids))

    async def grammar(self, params: SamplingParams) -> Grammar | None:
        """``LLM.grammar``: a large one takes most of a second, the first one of a tokenizer likewise."""
        if params.structured is None:
            return None
        return await self.run(lambda: self._llm.grammar(params))

    async def settings(self) -> dict[str, Any]:
        return await self.run(self._tokenizer.settings)

    async def run(self, work: Callable[[], T], size: int = _SHORT) -> T:
        """What ``work`` returns. ``size``: of the texts or ids that it goes through."""
        if size < _SHORT:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


def template_variables(fields: TemplateFields) -> dict[str, Any]:
    """What a request gives the chat template beside its messages. InvalidRequestError for what is not a template's."""
    variables = dict(fields.chat_template_kwargs or {})
    if foreign := sorted(set(_NOT_OF_TEMPLATES).intersection(variables)):
        name = "chat_template_kwargs"
        raise InvalidRequestError(f"{name}: {foreign[0]} is no variable of the model's template", name)
    for name in ("add_generation_prompt", "continue_final_message"):
        if (value := getattr(fields, name)) is not None:
            variables[name] = value
    return variables


def _naming(param: str, work: Callable[[], T]) -> Callable[[], T]:
    """The same, and errors say which field of the request they are about."""

    def named() -> T:
        try:
            return work()
        except InvalidRequestError as error:
            error.param = error.param or param
            raise

    return named

"""The tokenizer of a pair: text to ids, ids to text piece by piece, chat templates, end-of-text ids."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pearl.errors import InvalidRequestError
from pearl.models.detokenizer import ByteDetokenizer, IncrementalDetokenizer, ShowingDetokenizer, TextDetokenizer
from pearl.models.model_source import source_of
from pearl.models.token_bytes import TokenBytes
from pearl.models.vocabulary import Vocabulary
from pearl.user_values import lone_surrogate

_REMEMBERED_TEXTS = 16_384  # of one or two tokens


class Tokenizer:
    """Wraps a transformers tokenizer. ``vocab_size`` is one more than the highest id that means something; a model may
    have rows for more ids, or for fewer. ``special_texts``: of the ids that ``decode`` leaves out.
    """

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode_few = functools.lru_cache(_REMEMBERED_TEXTS)(self._decode)
        self.eos_ids = eos_ids
        self.vocabulary = Vocabulary.of(tokenizer)
        self.vocab_size = self.vocabulary.size
        self.special_texts = _special_texts(tokenizer, self._backend)
        self._token_bytes = TokenBytes.of(self._backend, self.special_texts)

    @classmethod
    def from_pretrained(cls, path: str) -> Tokenizer:
        """Of a model as ``source_of`` takes it. Raises ModelLoadError."""
        source = source_of(path)
        tokenizer = source.load_tokenizer()
        return cls(tokenizer, source.end_of_text_ids(tokenizer))

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequestError: a tokenizer without an unknown token, and the like, cannot encode every text."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        except Exception as error:  # tokenizers raises Exception itself
            raise InvalidRequestError(f"the model's tokenizer cannot encode this text: {error}") from error
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without special tokens and without ids in the vocabulary's gaps, which have none."""
        # A round decodes each of its tokens alone, after the one before, and again as the one before.
        return self._decode_few(tuple(ids)) if len(ids) <= 2 else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        # The Rust tokenizer itself, where there is one.
        if self._backend is not None:
            text: str = self._backend.decode(list(ids), skip_special_tokens=True)
            return text
        ids = [i for i in ids if i in self.vocabulary.tokens]  # others are an error to some of the Python ones
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text, in UTF-8: perhaps a part of a character; of a special token its name."""
        if (name := self.special_texts.get(token)) is not None:
            return name.encode()
        data = None if self._token_bytes is None else self._token_bytes[token]
        if data is not None:
            return data
        return self.decode((token, token))[len(self.decode((token,))) :].encode()  # the first one may lose its space

    def settings(self) -> dict[str, Any]:
        """What clients that build prompts themselves want to know: texts of special tokens, and the chat template."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        texts = {name: text for name in names if (text := getattr(self._tokenizer, name, None)) is not None}
        return texts | {"chat_template": self._tokenizer.chat_template}

    def detokenizer(self, prompt_ids: Sequence[int], shown: Collection[int] = ()) -> IncrementalDetokenizer:
        """For text that continues the prompt. ``shown``: special tokens that have a text here, their name."""
        if shown:
            names = {token: self.special_texts[token] for token in shown}
            return ShowingDetokenizer(self.detokenizer(prompt_ids), names)
        if self._token_bytes is not None:
            return ByteDetokenizer(self.decode, self._token_bytes, prompt_ids)
        return TextDetokenizer(self.decode, self.special_texts, prompt_ids)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of ``chat_text``. InvalidRequestError."""
        return self.encode_chat(self.chat_text(messages, variables))

    def encode_chat(self, text: str) -> list[int]:
        return self.encode(text, add_special_tokens=False)  # the template writes them itself

    def chat_text(self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None) -> str:
        """A conversation ({"role", "content"} messages) that ends where the assistant's answer begins.

        ``variables`` are the template's own, such as Qwen3's enable_thinking; ``tools`` is one of them.
        Raises InvalidRequestError if the tokenizer has no chat template, or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise InvalidRequestError(
                "this model's tokenizer has no chat template; use a chat model, or plain text with `pearl generate`"
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), **{"add_generation_prompt": True, **(variables or {}), "tokenize": False}
            )
        except Exception as error:  # templates raise whatever they like, jinja2's errors among it
            raise InvalidRequestError(f"the chat template refuses these messages: {error}") from error
        if lone_surrogate(text) is not None:
            raise InvalidRequestError("the messages have half a character (a lone surrogate); read them as UTF-8")
        return text


def _special_texts(tokenizer: Any, backend: Any) -> dict[int, str]:
    if backend is None:
        ids, texts = (getattr(tokenizer, name, ()) for name in ("all_special_ids", "all_special_tokens"))
        return dict(zip(ids, texts, strict=True))
    return {i: token.content for i, token in backend.get_added_tokens_decoder().items() if token.special}

"""The tokenizer of a pair: text to ids, ids to text piece by piece, chat templates, end-of-text ids."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pearl.errors import InvalidRequestError
from pearl.models.tokenizer_files import end_of_text_ids, load_tokenizer
from pearl.models.vocabulary import Vocabulary
from pearl.user_values import lone_surrogate

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no complete character
_REMEMBERED_TEXTS = 16_384  # of one or two tokens
_CONTEXT_TOKENS = 8  # of the prompt, so that a first token's leading space is decoded as in the middle of a text


class Tokenizer:
    """Wraps a transformers tokenizer. ``vocab_size`` is one more than the highest id that means something; a model may
    have rows for more ids, or for fewer.
    """

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode_few = functools.lru_cache(_REMEMBERED_TEXTS)(self._decode)
        self.eos_ids = eos_ids
        self.vocabulary = Vocabulary.of(tokenizer)
        self.vocab_size = self.vocabulary.size

    @classmethod
    def from_pretrained(cls, path: str) -> Tokenizer:
        """Load from a local folder or a hub id. Raises ModelLoadError."""
        tokenizer = load_tokenizer(path)
        return cls(tokenizer, end_of_text_ids(path, tokenizer))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text)
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

    def detokenizer(self, prompt_ids: Sequence[int]) -> IncrementalDetokenizer:
        """For text that continues the prompt."""
        return IncrementalDetokenizer(self, prompt_ids)

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Token ids of a conversation ({"role", "content"} messages) that ends where the assistant's answer begins.

        ``variables`` are the template's own, such as Qwen3's enable_thinking.
        Raises InvalidRequestError if the tokenizer has no chat template, or the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "this model's tokenizer has no chat template; use a chat model, or plain text with `pearl generate`"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), **{"add_generation_prompt": True, **(variables or {}), "tokenize": False}
            )
        except Exception as error:  # templates raise whatever they like, jinja2's errors among it
            raise InvalidRequestError(f"the chat template refuses these messages: {error}") from error
        if lone_surrogate(text) is not None:
            raise InvalidRequestError("the messages have half a character (a lone surrogate); read them as UTF-8")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)  # the template writes them itself
        return ids


class IncrementalDetokenizer:
    """Feeds on tokens, gives text that will not change any more. The pieces joined are the text of all the tokens.

    ids[context:done] has been given out already. A piece is given out once the text of ids[context:] no longer ends
    in an incomplete character; the cost of a token does not grow with the output.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._context, self._done = 0, len(self._ids)

    def feed(self, token: int) -> str:
        """Add a token; returns the text that is now certain, often its own, sometimes none."""
        self._ids.append(token)
        return self._advance(at_end=False)

    def flush(self) -> str:
        """The rest, incomplete characters as U+FFFD: at the end of an output."""
        return self._advance(at_end=True)

    def _advance(self, at_end: bool) -> str:
        given = self._tokenizer.decode(self._ids[self._context : self._done])
        text = self._tokenizer.decode(self._ids[self._context :])
        # A prompt may end inside a character: what completes it belongs to the output, what does not was given before.
        known = given if text.startswith(given) else given.rstrip(_REPLACEMENT)
        if not at_end and (len(text) <= len(known) or text.endswith(_REPLACEMENT)):
            return ""
        if not given.endswith(_REPLACEMENT):
            self._context = self._done  # between characters: decoding may start there
        self._done = len(self._ids)
        return text[len(known) :]

"""The tokenizer of a pair: text to ids, ids to text piece by piece, chat templates, end-of-text ids."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from pearl.errors import ConfigurationError, InvalidRequestError, ModelLoadError
from pearl.models.plain_files import plain_end_ids, plain_tokenizer

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no complete character
_REMEMBERED_TEXTS = 16_384  # of one or two tokens
_CONTEXT_TOKENS = 8  # of the prompt, so that a first token's leading space is decoded as in the middle of a text


class Tokenizer:
    """Wraps a transformers tokenizer. ``vocab_size`` counts the tokens that mean something, without padding."""

    def __init__(self, tokenizer: Any, eos_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decode_few = functools.lru_cache(_REMEMBERED_TEXTS)(self._decode)
        self.eos_ids = eos_ids
        self.vocab_size = len(tokenizer)

    @classmethod
    def from_pretrained(cls, path: str) -> Tokenizer:
        """Load from a local folder or a hub id. Raises ModelLoadError."""
        if (plain := plain_tokenizer(path)) is not None:
            return cls(plain, _eos_ids(path, plain))
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise ModelLoadError(f"no tokenizer could be loaded from {path!r}: {error}") from error
        return cls(tokenizer, _eos_ids(path, tokenizer))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, without special tokens."""
        # A round decodes each of its tokens alone, after the one before, and again as the one before.
        return self._decode_few(tuple(ids)) if len(ids) <= 2 else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        # The Rust tokenizer itself, where there is one.
        if self._backend is not None:
            text: str = self._backend.decode(list(ids), skip_special_tokens=True)
            return text
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def detokenizer(self, prompt_ids: Sequence[int]) -> IncrementalDetokenizer:
        """For text that continues the prompt."""
        return IncrementalDetokenizer(self, prompt_ids)

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation ({"role", "content"} messages) that ends where the assistant's answer begins.

        Raises InvalidRequestError if the tokenizer has no chat template, or the template refuses the messages.
        """
        if not self._tokenizer.chat_template:
            raise InvalidRequestError(
                "this model's tokenizer has no chat template; use a chat model, or plain text with `pearl generate`"
            )
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise whatever they like, jinja2's errors among it
            raise InvalidRequestError(f"the chat template refuses these messages: {error}") from error
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)  # the template writes them itself
        return ids

    def require_same_vocabulary(self, other: Tokenizer) -> None:
        """ConfigurationError unless both give every token the same id; drafted ids would mean something else."""
        mine, theirs = self._tokenizer.get_vocab(), other._tokenizer.get_vocab()
        if mine == theirs:
            return
        token = min((t for t in mine.keys() | theirs.keys() if mine.get(t) != theirs.get(t)), key=str)
        raise ConfigurationError(
            f"the draft's tokenizer differs from the target's: {len(theirs)} and {len(mine)} tokens; {token!r} is "
            f"{theirs.get(token, 'missing')} there and {mine.get(token, 'missing')} here; choose a draft of its family"
        )


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


def _eos_ids(path: str, tokenizer: Any) -> frozenset[int]:
    """All ids that end a text, from the tokenizer, the model's configuration and its generation configuration."""
    if (plain := plain_end_ids(path)) is not None:
        return plain.union(() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,))
    from transformers import AutoConfig, GenerationConfig

    found: set[int] = set()
    sources: list[Any] = [tokenizer.eos_token_id]
    for load in (AutoConfig.from_pretrained, GenerationConfig.from_pretrained):
        try:
            sources.append(load(path).eos_token_id)
        except (OSError, ValueError, AttributeError):  # either file may be missing
            continue
    for ids in sources:
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)

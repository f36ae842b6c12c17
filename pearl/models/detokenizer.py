"""Tokens to text, piece by piece, of what continues a prompt."""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

from pearl.models.token_bytes import TokenBytes

_REPLACEMENT = "\ufffd"  # what decoders put for bytes that are no character
_LONGEST_CHARACTER = 4  # bytes, and so tokens
_CONTEXT_TOKENS = 8

Decode = Callable[[Sequence[int]], str]


class IncrementalDetokenizer(Protocol):
    """Feeds on tokens, gives text that will not change any more; a token's cost grows with nothing.

    The pieces joined are what the output adds to the text of prompt and output, however its tokens were fed. Where a
    prompt ends inside a character, its whole text is the output's.
    """

    def feed(self, tokens: Sequence[int]) -> str:
        """Add tokens; returns the text that is now certain, often their own, sometimes none."""
        ...

    def flush(self) -> str:
        """The rest, incomplete characters as U+FFFD: at the end of an output."""
        ...


class ByteDetokenizer:
    """For decoders that work on bytes: a character is given out with its last byte, a byte that is of none at once.

    Byte-fallback decoders turn a whole run of byte tokens into U+FFFD if any of it is no character; here the characters
    before it, which have been given out, stay.
    """

    def __init__(self, decode: Decode, token_bytes: TokenBytes, prompt_ids: Sequence[int] = ()) -> None:
        self._decode, self._bytes = decode, token_bytes
        self._last: int | None = None  # the latest token with text: a first one may lose its leading space
        self._pending = b""  # begins a character
        self._prompts = 0  # bytes of it that the prompt's own text shows, as U+FFFD
        self._look_back(prompt_ids)

    def feed(self, tokens: Sequence[int]) -> str:
        text, data = "", self._pending
        for token in tokens:
            piece = self._bytes[token]
            if piece == b"":
                continue
            last, self._last = self._last, token
            if piece is None:
                text += self._complete(data, final=True) + self._text(last, token)
                data = b""
            elif last is None and piece == b" ":
                text += self._text(None, token)
            else:
                data += piece
        return text + self._complete(data)

    def flush(self) -> str:
        return self._complete(self._pending, final=True) if self._pending else ""

    def _look_back(self, prompt_ids: Sequence[int]) -> None:
        tail = b""
        for token in reversed(prompt_ids):
            data = self._bytes[token]
            if data == b"":
                continue
            if self._last is None:
                self._last = token
            if data is None or len(tail) >= _LONGEST_CHARACTER - 1:
                break
            tail = data + tail
        # UTF-8 synchronises itself: bytes before these do not matter.
        self._complete(tail[1 - _LONGEST_CHARACTER :])
        self._prompts = len(self._pending)

    def _text(self, last: int | None, token: int) -> str:
        """Of a token that is no part of a character, after the token ``last``."""
        if last is None:
            return self._decode((token,))
        return self._decode((last, token))[len(self._decode((last,))) :]

    def _complete(self, data: bytes, final: bool = False) -> str:
        """The text of ``data``; what begins a character at its end is pending."""
        text = ""
        while True:
            try:
                whole, used = codecs.utf_8_decode(data, "strict", final)
            except UnicodeDecodeError as error:
                if error.start:
                    self._prompts = 0
                text += data[: error.start].decode() + self._replaced(error.end - error.start)
                data = data[error.end :]
            else:
                self._pending = data[used:]
                self._prompts = 0 if used else self._prompts
                return text + whole

    def _replaced(self, size: int) -> str:
        count, shown = (size, self._prompts) if self._bytes.replaces_each else (1, min(1, self._prompts))
        self._prompts = 0
        return _REPLACEMENT * (count - shown)


class ShowingDetokenizer:
    """Gives some tokens that have no text one of their own."""

    def __init__(self, inner: IncrementalDetokenizer, texts: Mapping[int, str]) -> None:
        self._inner, self._texts = inner, texts

    def feed(self, tokens: Sequence[int]) -> str:
        if self._texts.keys().isdisjoint(tokens):
            return self._inner.feed(tokens)
        return "".join([self._feed(token) for token in tokens])

    def _feed(self, token: int) -> str:
        text = self._texts.get(token)
        return self._inner.feed((token,)) if text is None else self._inner.flush() + text

    def flush(self) -> str:
        return self._inner.flush()


class TextDetokenizer:
    """For other decoders, whose bytes are not known: a text that ends in U+FFFD may be an incomplete character, and is
    held back until it is none, or cannot become one any more.

    ids[context:done] has been given out already, ids[context:] is decoded.
    """

    def __init__(self, decode: Decode, special: Collection[int], prompt_ids: Sequence[int] = ()) -> None:
        """``special``: ids that ``decode`` leaves out."""
        self._decode, self._special = decode, special
        visible = (token for token in reversed(prompt_ids) if token not in special)
        self._ids = list(itertools.islice(visible, _CONTEXT_TOKENS))[::-1]
        while self._ids and decode(self._ids).startswith(_REPLACEMENT):  # begins inside a character
            del self._ids[0]
        self._context, self._done = 0, len(self._ids)

    def feed(self, tokens: Sequence[int]) -> str:
        return "".join([self._feed(token) for token in tokens])

    def _feed(self, token: int) -> str:
        if token in self._special:
            return ""
        self._ids.append(token)
        return self._advance(at_end=len(self._ids) - self._done >= _LONGEST_CHARACTER)

    def flush(self) -> str:
        return self._advance(at_end=True)

    def _advance(self, at_end: bool) -> str:
        given = self._decode(self._ids[self._context : self._done])
        text = self._decode(self._ids[self._context :])
        # A prompt may end inside a character: what completes it belongs to the output, what does not was given before.
        known = given if text.startswith(given) else given.rstrip(_REPLACEMENT)
        if not at_end and (len(text) <= len(known) or text.endswith(_REPLACEMENT)):
            return ""
        if len(text) > len(known) and (at_end or not given.endswith(_REPLACEMENT)):
            self._context = self._done  # between characters: decoding may start there
        self._done = len(self._ids)
        return text[len(known) :]

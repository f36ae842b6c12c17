"""Which token a piece of streamed text came from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import groupby, repeat
from typing import NamedTuple

from pearl.models import IncrementalDetokenizer
from pearl.outputs import CompletionOutput, StreamChunk, TokenSource


class Origin(NamedTuple):
    drafted: bool
    source: TokenSource | None = None  # where the request asks for it


class Attribution:
    """Splits the text of one output by origin: proposed by the drafter, or drawn from the target.

    A chunk's text and its tokens need not match: text waits while it could begin a stop string or is half a
    character, and the text of a stop is never shown. So the tokens are decoded here once more, only to learn how many
    characters each gives, and the engine's text is cut by these lengths. What is shown is always the engine's text.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer) -> None:
        self._detokenizer = detokenizer
        self._spans: deque[tuple[int, Origin]] = deque()  # (characters not shown yet, origin) of tokens, oldest first
        self._last = Origin(False)

    def split(self, part: StreamChunk | CompletionOutput) -> Iterator[tuple[str, bool]]:
        """(piece, drafted) for each stretch of equal origin; the pieces join to ``part.text``."""
        for drafted, pieces in groupby(self.pieces(part), lambda piece: piece[1].drafted):
            yield "".join(text for text, _ in pieces), drafted

    def pieces(self, part: StreamChunk | CompletionOutput) -> Iterator[tuple[str, Origin]]:
        """(piece, origin) for each token that gives text. A token whose text is shown in two parts gives two pieces."""
        origins = map(Origin, part.drafted, part.sources or repeat(None))
        for token, origin in zip(part.token_ids, origins, strict=True):
            self._last = origin
            if length := len(self._detokenizer.feed((token,))):
                self._spans.append((length, origin))
        text = part.text
        while text:
            length, origin = self._spans.popleft() if self._spans else (len(text), self._last)
            yield text[:length], origin
            if length > len(text):
                self._spans.appendleft((length - len(text), origin))
            text = text[length:]

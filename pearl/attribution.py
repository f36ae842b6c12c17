"""Which token a piece of streamed text came from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import groupby

from pearl.models import IncrementalDetokenizer
from pearl.outputs import CompletionOutput, StreamChunk


class Attribution:
    """Splits the text of one output by origin: proposed by the drafter, or drawn from the target.

    A chunk's text and its tokens need not match: text waits while it could begin a stop string or is half a
    character, and the text of a stop is never shown. So the tokens are decoded here once more, only to learn how many
    characters each gives, and the engine's text is cut by these lengths. What is shown is always the engine's text.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer) -> None:
        self._detokenizer = detokenizer
        self._spans: deque[tuple[int, bool]] = deque()  # (characters not shown yet, drafted) of tokens, oldest first
        self._last = False

    def split(self, part: StreamChunk | CompletionOutput) -> Iterator[tuple[str, bool]]:
        """(piece, drafted) for each stretch of equal origin; the pieces join to ``part.text``."""
        for drafted, pieces in groupby(self.pieces(part), lambda piece: piece[1]):
            yield "".join(text for text, _ in pieces), drafted

    def pieces(self, part: StreamChunk | CompletionOutput) -> Iterator[tuple[str, bool]]:
        """The same for each token that gives text. A token whose text is shown in two parts gives two pieces."""
        for token, drafted in zip(part.token_ids, part.drafted, strict=True):
            self._last = drafted
            if length := len(self._detokenizer.feed((token,))):
                self._spans.append((length, drafted))
        text = part.text
        while text:
            length, drafted = self._spans.popleft() if self._spans else (len(text), self._last)
            yield text[:length], drafted
            if length > len(text):
                self._spans.appendleft((length - len(text), drafted))
            text = text[length:]

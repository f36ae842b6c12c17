"""Which token a piece of streamed text came from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from pearl.models import IncrementalDetokenizer
from pearl.outputs import StreamChunk


class Attribution:
    """Splits the text of one output into pieces by origin: proposed by the drafter, or drawn from the target.

    A chunk's text and its tokens need not match: text waits while it could begin a stop string or is half a
    character, and the text of a stop is never shown. So the tokens are decoded here once more, only to learn how many
    characters each gives, and the engine's text is cut by these lengths. What is shown is always the engine's text.
    """

    def __init__(self, detokenizer: IncrementalDetokenizer) -> None:
        self._detokenizer = detokenizer
        self._spans: deque[tuple[int, bool]] = deque()  # (characters not shown yet, drafted), oldest first
        self._last = False

    def split(self, chunk: StreamChunk) -> Iterator[tuple[str, bool]]:
        """(piece, drafted) for each stretch of equal origin; the pieces join to ``chunk.text``."""
        for token, drafted in zip(chunk.token_ids, chunk.drafted, strict=True):
            self._last = drafted
            if length := len(self._detokenizer.feed((token,))):
                self._append(length, drafted)
        text = chunk.text
        while text:
            length, drafted = self._spans.popleft() if self._spans else (len(text), self._last)
            yield text[:length], drafted
            if length > len(text):
                self._spans.appendleft((length - len(text), drafted))
            text = text[length:]

    def _append(self, length: int, drafted: bool) -> None:
        if self._spans and self._spans[-1][1] == drafted:
            length += self._spans.pop()[0]
        self._spans.append((length, drafted))

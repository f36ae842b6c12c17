"""What a model thinks before it answers, split off the answer: a text that begins with <think> ... </think>."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pearl.models import IncrementalDetokenizer
from pearl.serving.tool_formats import held_back

THINK, THINK_END = "<think>", "</think>"
_OPENED = re.compile(re.escape(THINK) + r"\s*\Z")
_MOST_SPACE = 64  # characters around reasoning that are the markup's


class Split(NamedTuple):
    reasoning: str
    answer: str


def opens_reasoning(prompt_end: str) -> bool:
    """Whether what follows a prompt is thought: its template has written the tag already."""
    return _OPENED.search(prompt_end) is not None


def leaves_open(text: str) -> bool:
    """Whether a text that is to be continued ends amid reasoning."""
    return text.rfind(THINK) > text.rfind(THINK_END)


class ReasoningSplitter:
    """Feeds on pieces of a text. Spaces beside the tags belong to neither part; without tags all is answer."""

    def __init__(self, opened: bool) -> None:
        """``opened``: the prompt has the tag, and so the text begins as reasoning."""
        self._opened, self._text = opened, ""
        self._taken = 0  # characters of the text that are no longer in ``_text``
        self._step: Callable[[list[str], list[str]], bool] = self._begin
        self.began = opened
        self.end: int | None = None  # where in the text the reasoning has ended, with its tag

    @property
    def inside(self) -> bool:
        return self.began and self.end is None

    def feed(self, text: str) -> Split:
        self._text += text
        reasoning, answer = list[str](), list[str]()
        while self._step(reasoning, answer):
            pass
        return Split("".join(reasoning), "".join(answer))

    def finish(self) -> Split:
        """What was held back, at the end of the text."""
        rest, self._text = self._text, ""
        return Split(rest.rstrip(), "") if self.inside else Split("", rest if self.end is None else "")

    def _take(self, size: int) -> str:
        text, self._text = self._text[:size], self._text[size:]
        self._taken += size
        return text

    # Each step reads what it can and returns whether the next one can go on.

    def _begin(self, reasoning: list[str], answer: list[str]) -> bool:
        rest = self._text.lstrip()
        space = len(self._text) - len(rest)
        if space <= _MOST_SPACE and THINK.startswith(rest) and rest != THINK:
            return False
        if space <= _MOST_SPACE and rest.startswith(THINK):
            self._take(space + len(THINK))
            self.began = True
        self._step = self._skip_space if self.began else self._answer
        return True

    def _skip_space(self, reasoning: list[str], answer: list[str]) -> bool:
        self._take(len(self._text) - len(self._text.lstrip()))
        if not self._text:
            return False
        self._step = self._answer if self.end is not None else self._reason
        return True

    def _reason(self, reasoning: list[str], answer: list[str]) -> bool:
        text = self._text
        found = text.find(THINK_END)
        end = found if found >= 0 else len(text) - held_back(text, [THINK_END])
        begin = max(0, end - _MOST_SPACE)
        reasoning.append(self._take(begin + len(text[begin:end].rstrip())))
        if found < 0:
            return False
        self._take(len(self._text) - len(text) + found + len(THINK_END))
        self.end, self._step = self._taken, self._skip_space
        return True

    def _answer(self, reasoning: list[str], answer: list[str]) -> bool:
        answer.append(self._take(len(self._text)))
        return False


class ReasoningTokens:
    """How many tokens of an output are reasoning, its tags among them. A token across the border counts."""

    def __init__(self, detokenizer: IncrementalDetokenizer) -> None:
        self._detokenizer: IncrementalDetokenizer | None = detokenizer
        self._starts: list[int] = []  # in the text, of each token
        self._length = self.count = 0

    def feed(self, tokens: Sequence[int], splitter: ReasoningSplitter) -> None:
        """``splitter`` has read the text of these tokens, as far as it is given out."""
        if self._detokenizer is None:
            return
        for token in tokens:
            self._starts.append(self._length)
            self._length += len(self._detokenizer.feed((token,)))
        end = splitter.end
        self.count = 0 if not splitter.began else len(self._starts) if end is None else bisect_left(self._starts, end)
        if end is not None:
            self._detokenizer, self._starts = None, []

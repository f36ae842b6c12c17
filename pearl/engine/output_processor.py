"""Committed tokens in, text out; decides where an output ends. One instance for each output.

The output is cut at the first of: end of text, stop token, stop string, max_tokens. Tokens past the cut were
committed by the same verdict but are never returned, streamed or counted. The first min_tokens tokens end nothing: an
ending token counts after them, a stop string if its last character comes after them.

Where ids or length end an output is found without its text (``end``), which is made later (``text``) and may turn out
to have ended before, with a stop string.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from pearl.models import IncrementalDetokenizer
from pearl.outputs import FinishReason
from pearl.sampling_params import SamplingParams

_FIRST_MARK = 0xD800  # surrogates alone, which no decoded text contains, stand for special tokens


# How many leading tokens belong to the output, if no stop string ends it before; and why no more, if there are none.
End = tuple[int, FinishReason | None]


class Accepted(NamedTuple):
    kept: int  # leading tokens that belong to the output
    text: str  # new text that can no longer change and is no part of a stop string
    finish_reason: FinishReason | None


class OutputProcessor:
    """``eos_ids`` end the output unless params.ignore_eos; the ending token is returned, its text is not.

    ``special_texts`` are of tokens that have no text in the output; in a stop string they mean these tokens too.
    """

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        params: SamplingParams,
        max_tokens: int,
        eos_ids: Collection[int],
        special_texts: Mapping[int, str] | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._max_tokens = max_tokens
        self._min_tokens = params.min_tokens
        self._stop_strings, self._marks = _mark_special(params.stop_strings, special_texts or {})
        self._ending_ids = params.ending_ids(eos_ids)
        self._held = ""  # text that may still turn out to begin a stop string, with marks
        self._exempt = 0  # characters at its begin that the first min_tokens tokens gave
        self._count = 0  # tokens
        self._searched = 0  # of them, for stop strings

    def end(self, tokens: Sequence[int]) -> End:
        """Take newly committed tokens, in order. Must not be called again after it gave a finish_reason."""
        end = self._find_end(tokens)
        self._count += end[0]
        return end

    def text(self, tokens: Sequence[int], end: End) -> Accepted:
        """Of the tokens that ``end`` was given, in the same order. Not again after it gave a finish_reason."""
        kept, reason = end
        shown = tokens[: kept - 1 if reason == "stop" else kept]
        if self._stop_strings:
            return self._search(shown, kept, reason)
        text = self._detokenizer.feed(shown)
        return Accepted(kept, text if reason is None else text + self._detokenizer.flush(), reason)

    def _find_end(self, tokens: Sequence[int]) -> End:
        left = self._max_tokens - self._count
        if not self._ending_ids.isdisjoint(tokens):
            exempt = self._min_tokens - self._count
            for index, token in enumerate(tokens[:left]):
                if token in self._ending_ids and index >= exempt:
                    return index + 1, "stop"
        return (left, "length") if left <= len(tokens) else (len(tokens), None)

    def _search(self, shown: Sequence[int], kept: int, reason: FinishReason | None) -> Accepted:
        """Give out what no stop string can begin in; token by token, so that the first stop string ends the output."""
        text = ""
        for index, token in enumerate(shown):
            self._searched += 1
            mark = self._marks.get(token)
            self._held += self._detokenizer.feed((token,)) if mark is None else self._detokenizer.flush() + mark
            if self._searched <= self._min_tokens:
                self._exempt = len(self._held)
            elif (found := self._find_stop()) is not None:
                return Accepted(index + 1, text + self._give_out(found), "stop")
            text += self._give_out(len(self._held) - self._longest_stop_prefix())
        if reason is None:
            return Accepted(kept, text, None)
        self._searched += kept - len(shown)
        rest, stopped = self._close()
        return Accepted(kept, text + rest, "stop" if stopped else reason)

    def _close(self) -> tuple[str, bool]:
        """The text still held, cut at a stop string that its last bytes complete; and whether there was one."""
        self._held += self._detokenizer.flush()
        if self._searched <= self._min_tokens:
            self._exempt = len(self._held)
        found = self._find_stop()
        return self._give_out(len(self._held) if found is None else found), found is not None

    def _give_out(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        self._exempt = max(0, self._exempt - size)
        for mark in self._marks.values():
            text = text.replace(mark, "")
        return text

    def _find_stop(self) -> int | None:
        found = [
            at
            for stop in self._stop_strings
            if (at := self._held.find(stop, max(0, self._exempt + 1 - len(stop)))) >= 0
        ]
        return min(found, default=None)

    def _longest_stop_prefix(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for stop in self._stop_strings:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest


def _mark_special(
    stop_strings: Sequence[str], special_texts: Mapping[int, str]
) -> tuple[tuple[str, ...], dict[int, str]]:
    """The strings as they are and, where they contain texts of special tokens, with marks for those; the marks."""
    marked = list(stop_strings)
    marks: dict[int, str] = {}
    for token, text in sorted(special_texts.items(), key=lambda item: -len(item[1])):
        if text and any(text in stop for stop in marked):
            marks[token] = mark = chr(_FIRST_MARK + len(marks))
            marked = [stop.replace(text, mark) for stop in marked]
    return tuple(dict.fromkeys((*stop_strings, *marked))), marks

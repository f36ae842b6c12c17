"""Committed tokens in, text out; decides where an output ends. One instance for each output.

The output is cut at the first of: end of text, stop token, stop string, max_tokens. Tokens past the cut were
committed by the same verdict but are never returned, streamed or counted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from pearl.models.tokenizer import IncrementalDetokenizer
from pearl.outputs import FinishReason
from pearl.sampling_params import SamplingParams


class Accepted(NamedTuple):
    kept: int  # leading tokens that belong to the output
    text: str  # new text that can no longer change and is no part of a stop string
    finish_reason: FinishReason | None


class OutputProcessor:
    """``eos_ids`` end the output unless params.ignore_eos; the ending token is returned, its text is not."""

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        params: SamplingParams,
        max_tokens: int,
        eos_ids: Collection[int],
    ) -> None:
        self._detokenizer = detokenizer
        self._max_tokens = max_tokens
        self._min_tokens = params.min_tokens
        self._stop_strings = params.stop_strings
        self._ending_ids = frozenset(params.stop_token_ids or ()) | (
            frozenset() if params.ignore_eos else frozenset(eos_ids)
        )
        self._held = ""  # decoded text that may still turn out to begin a stop string
        self._count = 0

    def accept(self, tokens: Sequence[int]) -> Accepted:
        """Take newly committed tokens, in order. Must not be called again after it gave a finish_reason."""
        text: list[str] = []
        for index, token in enumerate(tokens):
            self._count += 1
            if token in self._ending_ids and self._count >= self._min_tokens:
                return Accepted(index + 1, "".join(text) + self._close()[0], "stop")
            self._held += self._detokenizer.feed(token)
            if (found := self._find_stop()) is not None:
                return Accepted(index + 1, "".join(text) + self._held[:found], "stop")
            if self._count >= self._max_tokens:
                rest, stopped = self._close()
                return Accepted(index + 1, "".join(text) + rest, "stop" if stopped else "length")
            safe = len(self._held) - self._longest_stop_prefix()
            text.append(self._held[:safe])
            self._held = self._held[safe:]
        return Accepted(len(tokens), "".join(text), None)

    def _close(self) -> tuple[str, bool]:
        """The text still held, cut at a stop string that its last bytes complete; and whether there was one."""
        self._held += self._detokenizer.flush()
        found = self._find_stop()
        return self._held[:found], found is not None

    def _find_stop(self) -> int | None:
        if self._count < self._min_tokens:
            return None
        found = [at for stop in self._stop_strings if (at := self._held.find(stop)) >= 0]
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

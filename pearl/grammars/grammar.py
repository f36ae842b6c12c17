"""A compiled grammar, and where an output is in it. The work is llguidance's (https://github.com/guidance-ai/llguidance)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pearl.host_tensors import Array

_LONGEST = 500  # characters of an error, which may quote all that it is about


class Grammar:
    """May be shared by threads: each makes matchers of its own. What they see of it does not change, but for failures.

    The library knows ids [0, vocab_size), and one more, which no model has: the end.
    """

    def __init__(self, start: Any, vocab_size: int) -> None:
        """``start``: an ``LLMatcher`` that has consumed nothing, and of which nothing but copies is ever asked."""
        self._start, self.vocab_size = start, vocab_size

    def matcher(self) -> Matcher:
        return Matcher(self)

    def begin(self) -> Any:
        return self._start.deep_copy()


class Matcher:
    """Follows one output, whatever is added to it or taken back. Belongs to one thread at a time."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar, self._native = grammar, grammar.begin()
        self._consumed: list[int] = []
        self.failure: str | None = None  # why the latest mask allows nothing

    def mask(self, output: Sequence[int]) -> Array | None:
        """Which token may follow: uint32 ``[vocab_size // 32 + 1]``, bit i % 32 of word i // 32 for token i; bit
        ``vocab_size`` tells whether the output may end here. None: it has ended, or is no beginning of the grammar's.

        All zero, with a ``failure``, where the grammar allows nothing, or is too complex to tell.
        """
        self.failure = None
        refused = self._follow(list(output))
        bits: Array = np.frombuffer(self._native.compute_bitmask(), np.uint32).copy()
        if self._native.is_error():  # in consuming a token, or in looking for those that may follow
            self.failure = one_line(self._native.get_error())
        elif refused is None:
            return bits
        elif not has(bits, refused):
            return None
        else:  # nothing that was allowed may be taken for an end, behind which anything goes
            self.failure = "a token was refused that had been allowed"
        bits[:] = 0
        return bits

    def _follow(self, output: list[int]) -> int | None:
        """Go to the state after ``output``, or before its first token that may not stand there, which is returned."""
        if self._native.is_error():  # for good
            self._native, self._consumed = self._grammar.begin(), []
        common = min(len(output), len(self._consumed))
        while self._consumed[:common] != output[:common]:  # what is taken back is a window at most
            common -= 1
        if common < len(self._consumed):
            self._native.rollback(len(self._consumed) - common)
            del self._consumed[common:]
        rest = output[common:]
        taken = self._native.try_consume_tokens(rest) if rest else 0
        self._consumed += rest[:taken]
        return rest[taken] if taken < len(rest) else None


def has(bits: Array, token: int) -> bool:
    return bool(bits[token // 32] >> np.uint32(token % 32) & np.uint32(1))


def one_line(error: str) -> str:
    """What the library says, without the excerpt of a grammar that is partly ours."""
    lines = []
    for line in error.splitlines():
        if line.lstrip()[:1].isdigit() and " | " in line:
            break
        if line.strip() and not line.startswith("<"):
            lines.append(line.strip())
    text = " ".join(lines)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"

"""Log-probabilities of prompts, of which a forward computes a part: what is wanted of each, found, and known so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.engine.token_logprobs import Span, TopLogprobs
from pearl.errors import RoundError
from pearl.host_tensors import from_numbers
from pearl.messages import ForwardWork, FoundPrompt, PromptLogprobs, PromptRows, TokenLogprobs

_PIECE_BYTES = 1 << 23  # of rows whose log-softmax is computed at a time, in fp32


class PromptProgress:
    """One request's. Row i of its prompt's logits tells of token i + 1; of the first token nothing can be told.

    What is known stays known when the request is preempted: each row is wanted once.
    """

    def __init__(self, prompt: Sequence[int], most: int) -> None:
        """``most``: how many of the likeliest tokens are wanted at each position."""
        self._prompt, self._most = tuple(prompt), most
        self._known = 1  # leading tokens of which nothing is wanted any more
        self._found: list[Callable[[], tuple[TokenLogprobs, ...]]] = []
        self._given = False

    @property
    def missing(self) -> int:
        """How many rows are still wanted."""
        return len(self._prompt) - self._known

    @property
    def first_row(self) -> int:
        """The position of the first of them: keys and values before it need not be computed, if they are cached."""
        return self._known - 1

    def wanted(self, request_id: int, start: int, end: int) -> PromptRows | None:
        """Of the rows at positions [start, end), where there are any."""
        tokens = self._prompt[max(start + 1, self._known) : end + 1]
        return PromptRows(request_id, tokens, self._most) if tokens else None

    def add(self, found: FoundPrompt) -> None:
        """Of all rows that were wanted of a forward."""
        self._known += found.size
        self._found.append(found.entries)

    def take(self) -> PromptLogprobs | None:
        """All of them, once; then None. RoundError if they are no numbers."""
        if self._given:
            return None
        self._given = True
        entries = tuple(chain.from_iterable(entries() for entries in self._found))
        self._found.clear()
        if any(math.isnan(entry.logprob) for entry in entries):
            raise RoundError("the target's logits of the prompt are NaN; its weights, or its dtype, are at fault")
        return (None, *entries)


class _Rows(NamedTuple):
    begin: int  # of the forward's rows of logits
    wanted: PromptRows


def find_prompts(
    logits: Tensor, work: Sequence[ForwardWork], prompts: Sequence[PromptRows], vocab_size: int
) -> tuple[dict[int, FoundPrompt], Tensor]:
    """What is wanted of prompts, by request id, on the host when the device's next mark has come; and the other rows
    of ``logits``, ``[N, >= vocab_size]``: the verdicts', in order.
    """
    wanted = {rows.request_id: rows for rows in prompts}
    placed, judged, tokens = list[_Rows](), list[int](), list[int]()
    for item in work:
        begin, rows = len(tokens), wanted.get(item.state.request_id)
        if rows is not None:
            placed.append(_Rows(begin, rows))
            tokens += rows.tokens
        judged += range(len(tokens), begin + item.num_logits)
        tokens += [0] * (begin + item.num_logits - len(tokens))
    on_rows = from_numbers(tokens, torch.int64, logits.device)
    found = {rows.wanted.request_id: _find(logits, rows, on_rows, vocab_size) for rows in placed}
    with torch.inference_mode():
        return found, logits[from_numbers(judged, torch.int64, logits.device)] if judged else logits[:0]


def _find(logits: Tensor, rows: _Rows, tokens: Tensor, vocab_size: int) -> FoundPrompt:
    """Piece by piece, so that no more than a piece's distributions are held. ``tokens``: of each row of logits."""
    count, most = len(rows.wanted.tokens), rows.wanted.most
    piece = max(1, _PIECE_BYTES // (4 * vocab_size))
    pieces = []
    for begin in range(rows.begin, rows.begin + count, piece):
        span = Span(begin, min(begin + piece, rows.begin + count), most)
        top = TopLogprobs(logits, [span], vocab_size)
        top.choose(tokens)
        pieces.append((top.found(), span))
    return FoundPrompt(
        count, lambda: tuple(entry for found, span in pieces for entry in found.of(span.begin, span.end - span.begin))
    )

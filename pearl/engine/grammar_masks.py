"""Which tokens grammars allow, on logits: the same for the target's rows and for the draft's steps."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pearl.grammars import Matcher
from pearl.grammars.grammar import has
from pearl.host_tensors import Array, upload
from pearl.messages import SequenceState

_WORD = 32  # bits


class MaskedRow(NamedTuple):
    """A row of logits, and the output that its token follows."""

    place: int  # in the logits
    state: SequenceState
    output: Sequence[int]


class GrammarMasks:
    """Belongs to one side, the target's or the draft's, and remembers for each lane where its request's output is. What
    a mask says depends on the output alone: after a rejection or a preemption there is nothing to put right.
    """

    def __init__(self, vocab_size: int, eos_ids: Collection[int]) -> None:
        self._vocab_size, self._eos_ids = vocab_size, eos_ids
        self._matchers: dict[int, tuple[int, Matcher]] = {}  # by lane; with the request's id

    def apply(self, logits: Tensor, rows: Sequence[MaskedRow]) -> None:
        """Ban, in place, what the grammar of each row's request, which has one, does not allow. Rows behind an output's
        end are left alone.

        logits: fp32 ``[N, >= vocab_size]``. An output may end, with any token that ends it, only where its grammar may.
        """
        found = [(row.place, bits) for row in rows if (bits := self._bits(row)) is not None]
        if not found:
            return
        places, masks = zip(*found, strict=True)
        (words,) = upload([np.stack(masks).view(np.int32)], logits.device)
        shifts = torch.arange(_WORD, dtype=torch.int32, device=logits.device)
        banned = (words[:, :, None] >> shifts & 1).flatten(1)[:, : self._vocab_size] == 0
        for place, row in zip(places, banned.unbind(), strict=True):
            logits[place, : self._vocab_size].masked_fill_(row, -torch.inf)

    def _bits(self, row: MaskedRow) -> Array | None:
        bits = self._matcher(row.state).mask(row.output)
        if bits is None:
            return None
        may_end = has(bits, self._vocab_size)
        for token in row.state.params.ending_ids(self._eos_ids):
            if token < self._vocab_size:
                _put(bits, token, may_end)
        return bits

    def _matcher(self, state: SequenceState) -> Matcher:
        assert state.grammar is not None
        request_id, matcher = self._matchers.get(state.lane, (None, None))
        if matcher is None or request_id != state.request_id:
            matcher = state.grammar.matcher()
            self._matchers[state.lane] = (state.request_id, matcher)
        return matcher

    def failure(self, row: MaskedRow) -> str:
        """Why nothing could be drawn from this row, of a request with a grammar."""
        matcher = self._matcher(row.state)
        matcher.mask(row.output)
        why = matcher.failure or "of the tokens that it allows, logit_bias, min_tokens or the model bans every one"
        return f"no token is left to draw after what the structured output has so far: {why}"


def _put(bits: Array, token: int, value: bool) -> None:
    bit = np.uint32(1 << token % _WORD)
    if value:
        bits[token // _WORD] |= bit
    else:
        bits[token // _WORD] &= ~bit

"""The captured calls of a drafted window, and the memory that they share. Nothing in them looks at a value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.drafting.logits_ring import LogitsRing
from pearl.messages import DrawnTokens
from pearl.models import ForwardBatch
from pearl.workers.batch_arrays import DTYPES
from pearl.workers.graph_runner import GraphRunner
from pearl.workers.shapes import BatchShape
from pearl_kernels import SamplingTensors, Stream

CATCH_UP = 2  # tokens of a request that the draft may still have to compute: after a bonus token two


class WindowKey(NamedTuple):
    """What a captured window is fixed to."""

    shape: BatchShape
    stores: bool  # q of some sequence is kept
    alternatives: int  # that are ranked for each drawn token; without any there are no branches


class WindowCalls:
    """Of R sequences: items, then early branches, then late ones, then padding.

    ``begin`` computes what they lack and draws a token for each; a late branch, which lacks nothing, takes part in the
    drawing alone. ``join`` gives late branches their own tokens in place of what was drawn, and the copies of pages
    that they begin in. ``go_on``, repeated, computes the latest tokens and draws one more.
    """

    def __init__(
        self,
        key: WindowKey,
        inputs: Mapping[str, Tensor],
        drawn: DrawnTokens,
        runner: GraphRunner,
        ring: LogitsRing,
        vocab_size: int,
        stream: Stream,
    ) -> None:
        """``drawn``: where every step's tokens go, ``[ring.window, 2 + alternatives, R]``."""
        self._key, self._inputs, self._drawn, self._runner, self._ring = key, inputs, drawn, runner, ring
        self._vocab_size, self._stream = vocab_size, stream
        sequences, device = key.shape.sequences, runner.queue.device
        self._params = SamplingTensors(**{name: inputs[name] for name in SamplingTensors.__dataclass_fields__})
        self._first = ForwardBatch(**{name: inputs[name] for name in DTYPES}, most_rows=CATCH_UP)
        self._tables = self._first.block_tables[:sequences]
        self._starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        self._every = torch.arange(sequences, device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)  # tokens that each window has, but for this one
        self._token = torch.zeros(sequences, dtype=torch.int64, device=device)  # each window's latest
        self._last = torch.zeros(sequences, dtype=torch.int64, device=device)  # the step of each window's last one

    def begin(self) -> None:
        self._step.zero_()
        self._last.copy_(self._inputs["last"])
        self._draw(self._forward(self._first))

    def join(self) -> None:
        """Once, behind ``begin``. Of a late branch whose alternative there is not the window ends here."""
        rank = self._inputs["rank"]
        ranked = DrawnTokens(self._drawn.packed[0]).alternatives.index_select(1, self._inputs["parent"])
        own = ranked.gather(0, rank.clamp(min=0)[None])[0]
        is_late, is_missing = rank >= 0, own < 0
        self._token.copy_(torch.where(is_late, own.clamp(min=0), self._token))
        self._last.masked_fill_(is_late & is_missing, 0)
        self._runner.copy_pairs(self._inputs["late_copies"])

    def go_on(self) -> None:
        position = self._position()
        # A window that has ended sees what its last token saw; that token itself is not computed.
        lives = self._last > self._step
        slots, contexts = self._slots(position, lives), (position + lives).to(torch.int32)
        batch = ForwardBatch(
            self._token, position, slots, self._tables, self._starts, contexts, self._every, most_rows=1
        )
        logits = self._forward(batch)
        self._step.add_(1).clamp_(
            max=self._ring.window - 1
        )  # to be captured it may run once more than a window is long
        self._draw(logits)

    def _position(self) -> Tensor:
        """Of the token that a window draws at this step, or of its last one."""
        return self._inputs["end"] + torch.minimum(self._last, self._step)

    def _forward(self, batch: ForwardBatch) -> Tensor:
        return self._runner.model.forward(batch, self._runner.cache)

    def _draw(self, logits: Tensor) -> None:
        step, drawn, position = self._step, self._drawn, self._position()
        count = self._key.alternatives
        tokens, logprobs, ranked = self._runner.kernels.sample(
            logits, self._params, position, self._vocab_size, self._stream, count
        )
        self._token.copy_(tokens)
        drawn.tokens.index_copy_(0, step, tokens[None])
        drawn.logprobs.index_copy_(0, step, logprobs[None])
        if ranked is not None:
            drawn.own_scores.index_copy_(0, step, ranked.drawn[None])
            drawn.alternatives.index_copy_(0, step, ranked.tokens.T[None].to(torch.int32))
            drawn.scores.index_copy_(0, step, ranked.scores.T[None])
        if self._key.stores:
            self._store(logits, position)

    def _slots(self, position: Tensor, lives: Tensor) -> Tensor:
        size, tables = self._runner.page_size, self._tables
        page = (position // size).clamp(max=tables.shape[1] - 1)
        slot = tables.gather(1, page[:, None])[:, 0] * size + position % size
        return torch.where(lives, slot, -1)

    def _store(self, logits: Tensor, position: Tensor) -> None:
        ring, inputs = self._ring.allocate(logits.shape[-1], logits.dtype, logits.device), self._inputs
        base, keeps = inputs["ring_base"], (self._last >= self._step) & (self._step >= inputs["drawn_from"])
        row = torch.where(keeps & (base >= 0), base + position % inputs["ring_size"], self._ring.spare_row)
        ring.index_copy_(0, row, logits)

"""A whole drafted window in one C++ call: forward, draw, forward, draw, ... without Python, or the GIL, in between.

A small draft model's forward takes as long as the Python of one step; and while the draft's thread runs Python, the
target's has to wait for the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pearl.drafting.draft_rows import DraftRow, draft_rows
from pearl.drafting.host_window import DraftedWindows
from pearl.drafting.logits_ring import LogitsRing
from pearl.messages import Drafted, DraftPlan, Ranked
from pearl.models import FusedDecoder
from pearl.sampling_batch import SamplingBatches
from pearl.workers import ModelRunner
from pearl_kernels import KernelSet, Rule, SamplingTensors, Stream

_CPU = torch.device("cpu")


def can_fuse_windows(kernels: KernelSet) -> bool:
    """Whether the C++ provider also draws tokens; the forward is ``can_fuse``'s matter."""
    return kernels.providers["sample"] == "cpu"


class _Drawn(NamedTuple):
    tokens: list[list[int]]
    logprobs: list[list[float]]
    ranked: list[list[tuple[float, tuple[int, ...], tuple[float, ...]]]]


class FusedWindows:
    """Of one drafter whose forward is fused: to the bit as token by token."""

    def __init__(
        self,
        runner: ModelRunner,
        decoder: FusedDecoder,
        rule: Rule,
        vocab_size: int,
        ring: LogitsRing,
        stream: Stream,
    ) -> None:
        from pearl_kernels.cpu import _core

        self._core, self._drafter = _core, _core.WindowDrafter(decoder.native)
        self._decoder, self._rule, self._ring = decoder, rule, ring
        self._vocab_size, self._stream = vocab_size, stream
        self._width, self._dtype = runner.model.config.vocab_size, runner.model.dtype
        self._batches = SamplingBatches(runner.queue.device, for_draft=True)

    def draft(self, plan: DraftPlan) -> DraftedWindows:
        """Windows of those that draft, and of their branches. No token's logits may depend on the host, and block
        tables reach to the windows' ends. Raises ValueError, with nothing written, if an index is out of range.
        """
        rows = draft_rows(plan.work, self._ring, self._rule)
        params = self._batches.tensors([row.forward.state for row in rows])
        windows = list(map(self._window, rows, *self._draw(rows, params, plan)))
        main = {item.forward.state.request_id: windows[index] for index, item in enumerate(plan.work) if item.num_draft}
        prepared = {row.branch.id: window for row, window in zip(rows, windows, strict=True) if row.branch is not None}
        return DraftedWindows(main, prepared, max(1, *(row.wanted for row in rows)))

    def _draw(self, rows: Sequence[DraftRow], params: SamplingTensors, plan: DraftPlan) -> _Drawn:
        """Drafted tokens, their log q, and alternatives if any are wanted: a list for each row."""
        if params.layout != (_CPU, len(rows)):
            raise ValueError(f"draft_window: parameters for {len(rows)} requests on cpu, not {params.layout}")
        counts, bases = [row.wanted for row in rows], [row.ring_base for row in rows]
        ring = self._ring.allocate(self._width, self._dtype) if max(bases) >= 0 else None
        logits = self._decoder.new_logits(len(counts) - counts.count(0))
        tokens, logprobs, ranked = self._drafter.draft(
            self._decoder.work_batch([row.forward for row in rows]),
            logits.data_ptr(),
            counts,
            bases,
            [row.ring_size for row in rows],
            self._core.Sampling(*params.addresses),
            self._vocab_size,
            self._stream,
            0 if ring is None else ring.data_ptr(),
            0 if ring is None else ring.shape[0],
            plan.alternatives,
            [(row.parent, row.branch.rank) for row in rows if row.branch is not None and row.is_late],
            [(copy.source, copy.destination) for copy in plan.late_copies],
        )
        return _Drawn(tokens, logprobs, ranked or [[]] * len(rows))

    @staticmethod
    def _window(
        row: DraftRow,
        tokens: list[int],
        logprobs: list[float],
        ranked: list[tuple[float, tuple[int, ...], tuple[float, ...]]],
    ) -> tuple[Drafted, ...]:
        """A branch's begins with its own token, which is not drawn."""
        every = map(Ranked._make, ranked) if ranked else [None] * len(tokens)
        window = tuple(map(Drafted, tokens, logprobs, row.places(len(tokens)), every))
        if row.branch is None:
            return window
        if row.branch.token is None:
            return (Drafted(tokens[0], 0.0, -1), *window[1:]) if tokens else ()
        return (Drafted(row.branch.token, 0.0, -1), *window)

"""A whole drafted window in one C++ call: forward, draw, forward, draw, ... without Python, or the GIL, in between.

A small draft model's forward takes as long as the Python of one step; and while the draft's thread runs Python, the
target's has to wait for the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pearl.drafting.draft_rows import DraftRow
from pearl.drafting.logits_ring import LogitsRing
from pearl.messages import Drafted, DraftPlan, Ranked
from pearl.models.fused_decoder import BoundDecoder
from pearl.sampling_batch import SamplingBatches
from pearl_kernels import KernelSet, SamplingTensors, Stream

if TYPE_CHECKING:
    from pearl_kernels.cpu import _core

_CPU = torch.device("cpu")


def can_fuse_windows(kernels: KernelSet) -> bool:
    """Whether the C++ provider also draws tokens; whether it computes the forwards is another question."""
    return kernels.providers["sample"] == "cpu"


class Features(NamedTuple):
    """Of a decoder that reads them: ``features`` ``[N, D]`` of the first forward's tokens, and room for its outputs.

    Its tokens' states are kept in ``rows``, ``[.., D]``: of each sequence those at ``base + p % size``.
    """

    features: Tensor
    outputs: Tensor
    rows: Tensor
    base: list[int]
    size: list[int]


class _Drawn(NamedTuple):
    tokens: list[list[int]]
    logprobs: list[list[float]]
    ranked: list[list[tuple[float, tuple[int, ...], tuple[float, ...]]]]


class WindowCall:
    """Of one drafter whose forwards are C++: to the bit as token by token."""

    def __init__(self, decoder: BoundDecoder, vocab_size: int, ring: LogitsRing, stream: Stream) -> None:
        from pearl_kernels.cpu import _core

        self._core, self._drafter = _core, _core.WindowDrafter(decoder.native)
        self._decoder, self._ring = decoder, ring
        self._vocab_size, self._stream = vocab_size, stream
        self._batches = SamplingBatches(_CPU, for_draft=True)

    def draft(
        self, rows: Sequence[DraftRow], plan: DraftPlan, features: Features | None = None
    ) -> list[tuple[Drafted, ...]]:
        """A window for each row, late ones last. No token's logits may depend on the host, and block tables reach to
        the windows' ends. Raises ValueError, with nothing written, if an index is out of range.
        """
        params = self._batches.tensors([row.forward.state for row in rows])
        return list(map(self._window, rows, *self._draw(rows, params, plan, features)))

    def _draw(
        self, rows: Sequence[DraftRow], params: SamplingTensors, plan: DraftPlan, features: Features | None
    ) -> _Drawn:
        """Drafted tokens, their log q, and alternatives if any are wanted: a list for each row."""
        if params.layout != (_CPU, len(rows)):
            raise ValueError(f"draft_window: parameters for {len(rows)} requests on cpu, not {params.layout}")
        counts, bases, decoder = [row.wanted for row in rows], [row.ring_base for row in rows], self._decoder
        ring = self._ring.allocate(decoder.vocab_size, decoder.dtype) if max(bases) >= 0 else None
        logits = decoder.new_logits(len(counts) - counts.count(0))
        tokens, logprobs, ranked = self._drafter.draft(
            decoder.work_batch([row.forward for row in rows]),
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
            [
                (row.parent, row.branch.rank, row.token, row.state)
                for row in rows
                if row.branch is not None and row.is_late
            ],
            [(copy.source, copy.destination) for copy in plan.late_copies],
            None if features is None else self._states(features),
        )
        return _Drawn(tokens, logprobs, ranked or [[]] * len(rows))

    def _states(self, given: Features) -> _core.States:
        return self._core.States(
            given.features.data_ptr(), given.outputs.data_ptr(), given.rows.data_ptr(), given.rows.shape[0],
            given.base, given.size,
        )  # fmt: skip

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
        if row.is_late:
            return (Drafted(tokens[0], 0.0, -1), *window[1:]) if tokens else ()
        assert row.branch.token is not None
        return (Drafted(row.branch.token, 0.0, -1), *window)

"""A whole drafted window in one C++ call: forward, draw, forward, draw, ... without Python, or the GIL, in between.

A small draft model's forward takes as long as the Python of one step; and while the draft's thread runs Python, the
target's has to wait for the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pearl.messages import DraftWork
from pearl.models.fused_decoder import FusedDecoder
from pearl_kernels import KernelSet, SamplingTensors, Stream


@dataclass(frozen=True)
class WindowRing:
    """Where the logits of drafted tokens are kept.

    logits: ``[rows, V]``, None if none are. The token at position p goes to row ``bases[i] + p % size``, for item i of
    the work; nowhere if the base is negative.
    """

    logits: Tensor | None
    size: int
    bases: list[int]


def can_fuse_windows(kernels: KernelSet) -> bool:
    """Whether the C++ provider also draws tokens; the forward is ``can_fuse``'s matter."""
    return kernels.providers["sample"] == "cpu"


class FusedWindow:
    """Drafts with a fused decoder, to the bit as token by token. Belongs to the decoder's worker."""

    def __init__(self, decoder: FusedDecoder, vocab_size: int, stream: Stream) -> None:
        from pearl_kernels.cpu import _core

        self._decoder, self._vocab_size, self._stream = decoder, vocab_size, stream
        self._drafter = _core.WindowDrafter(decoder.native)
        self._core = _core

    def draft(
        self, work: Sequence[DraftWork], params: SamplingTensors, ring: WindowRing
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Compute each item's forward, then draft. Block tables reach to the windows' ends; ``params`` has an entry for
        each item, on the CPU.

        Returns the drafted tokens and their log q, a list for each item. Raises ValueError, with nothing written, if an
        index is out of range.
        """
        counts = [item.num_draft for item in work]
        if params.layout != ("cpu", len(counts)):
            raise ValueError(f"draft_window: parameters for {len(counts)} requests on cpu, not {params.layout}")
        logits = self._decoder.new_logits(len(counts) - counts.count(0))
        return self._drafter.draft(
            self._decoder.work_batch([item.forward for item in work]),
            logits.data_ptr(),
            counts,
            ring.bases,
            self._core.Sampling(*params.addresses),
            self._vocab_size,
            self._stream,
            0 if ring.logits is None else ring.logits.data_ptr(),
            0 if ring.logits is None else ring.logits.shape[0],
            ring.size,
        )

"""A whole drafted window in one C++ call: forward, draw, forward, draw, ... without Python, or the GIL, in between.

A small draft model's forward takes as long as the Python of one step; and while the draft's thread runs Python, the
target's has to wait for the GIL.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.models.forward_batch import ForwardBatch
from pearl.models.fused_decoder import FusedDecoder
from pearl_kernels import KernelSet, SamplingTensors, Stream


@dataclass(frozen=True)
class WindowBatch:
    """What R sequences draft after a forward; tensors on the CPU.

    num_draft: int64 ``[R]``, at most ``longest``; 0 where a sequence only takes part in the forward.
    params: one entry for each sequence.
    ring: ``[.., V]``, where logits of drafted tokens are kept: those of the token at position p in row
    ``ring_base + p % ring_size``. ring_base: int64 ``[R]``, -1 where they are not; with no ring, everywhere.
    """

    num_draft: Tensor
    longest: int
    params: SamplingTensors
    ring: Tensor | None
    ring_size: int
    ring_base: Tensor


def can_fuse_windows(kernels: KernelSet) -> bool:
    """Whether the C++ provider also draws tokens; the forward is ``can_fuse``'s matter."""
    return kernels.providers["sample"] == "cpu"


class FusedWindow:
    """Drafts with a fused decoder, to the bit as token by token. Belongs to the decoder's worker."""

    def __init__(self, decoder: FusedDecoder, vocab_size: int, stream: Stream) -> None:
        from pearl_kernels.cpu import _core

        self._decoder, self._vocab_size, self._stream = decoder, vocab_size, stream
        self._drafter = _core.WindowDrafter(decoder.native)
        self._new_sampling = _core.Sampling

    def draft(self, batch: ForwardBatch, window: WindowBatch) -> tuple[Tensor, Tensor]:
        """Compute ``batch``, which asks for the last token's logits of each sequence that drafts and for no others, and
        whose block tables reach to the windows' ends; then draft.

        Returns tokens, int64, and their log q, fp32, both ``[R, longest]``; what is past a window's end is undefined.
        Raises ValueError, with nothing written, if an index is out of range.
        """
        sequences = batch.block_tables.shape[0]
        tokens = torch.empty((sequences, window.longest), dtype=torch.int64)
        logprobs = torch.empty((sequences, window.longest), dtype=torch.float32)
        logits, params, ring = self._decoder.new_logits(batch), window.params, window.ring
        self._drafter.draft(
            self._decoder.native_batch(batch, logits),
            window.num_draft.data_ptr(),
            window.longest,
            self._new_sampling(
                params.temperature.data_ptr(),
                params.top_k.data_ptr(),
                params.top_p.data_ptr(),
                params.min_p.data_ptr(),
                params.seed.data_ptr(),
            ),
            self._vocab_size,
            self._stream,
            0 if ring is None else ring.data_ptr(),
            0 if ring is None else ring.shape[0],
            window.ring_size,
            window.ring_base.data_ptr(),
            tokens.data_ptr(),
            logprobs.data_ptr(),
        )
        return tokens, logprobs

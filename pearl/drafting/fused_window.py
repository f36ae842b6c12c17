"""A whole drafted window in one C++ call: forward, draw, forward, draw, ... without Python, or the GIL, in between.

A small draft model's forward takes as long as the Python of one step; and while the draft's thread runs Python, the
target's has to wait for the GIL.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pearl.drafting.logits_ring import LogitsRing, keeps_logits
from pearl.messages import Drafted, DraftWork, Windows
from pearl.models import FusedDecoder
from pearl.sampling_batch import SamplingBatches
from pearl.workers import ModelRunner
from pearl_kernels import KernelSet, Rule, SamplingTensors, Stream

_CPU = torch.device("cpu")
Ranked = tuple[float, list[int], list[float]]  # a drafted token's score, its alternatives, and theirs: see `sample`


def can_fuse_windows(kernels: KernelSet) -> bool:
    """Whether the C++ provider also draws tokens; the forward is ``can_fuse``'s matter."""
    return kernels.providers["sample"] == "cpu"


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

    def draft(self, work: Sequence[DraftWork]) -> tuple[Windows, int]:
        """Windows of those that draft, and how many forwards they took. No token's logits may depend on the host, and
        block tables reach to the windows' ends. Raises ValueError, with nothing written, if an index is out of range.
        """
        tokens, logprobs, _ = self._draw(work, self._batches.tensors([item.forward.state for item in work]))
        windows = {
            item.forward.state.request_id: tuple(
                map(Drafted, tokens[i], logprobs[i], self._ring.window_rows(item, self._rule))
            )
            for i, item in enumerate(work)
            if item.num_draft
        }
        return windows, max(1, *(item.num_draft for item in work))

    def _draw(
        self, work: Sequence[DraftWork], params: SamplingTensors, alternatives: int = 0
    ) -> tuple[list[list[int]], list[list[float]], list[list[Ranked]]]:
        """Drafted tokens and their log q, a list for each item; and so many alternatives to each, if any are wanted."""
        counts = [item.num_draft for item in work]
        if params.layout != (_CPU, len(counts)):
            raise ValueError(f"draft_window: parameters for {len(counts)} requests on cpu, not {params.layout}")
        states = [item.forward.state for item in work]
        bases = [self._ring.base(s.lane) if keeps_logits(s.params, self._rule) else -1 for s in states]
        ring = self._ring.allocate(self._width, self._dtype) if max(bases) >= 0 else None
        logits = self._decoder.new_logits(len(counts) - counts.count(0))
        return self._drafter.draft(
            self._decoder.work_batch([item.forward for item in work]),
            logits.data_ptr(),
            counts,
            bases,
            self._core.Sampling(*params.addresses),
            self._vocab_size,
            self._stream,
            0 if ring is None else ring.data_ptr(),
            0 if ring is None else ring.shape[0],
            self._ring.size,
            alternatives,
        )

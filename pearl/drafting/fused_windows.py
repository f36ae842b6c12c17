"""Windows that a CPU drafts in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pearl.drafting.logits_ring import LogitsRing, keeps_logits
from pearl.host_tensors import array, upload
from pearl.messages import Drafted, DraftWork, Windows
from pearl.models import FusedDecoder, FusedWindow, WindowBatch
from pearl.sampling_batch import SamplingBatches
from pearl.workers import ModelRunner
from pearl.workers.batch_arrays import BatchLists
from pearl.workers.model_runner import upload_batch
from pearl_kernels import Rule, Stream


class FusedWindows:
    """Of one drafter whose forward is fused."""

    def __init__(
        self,
        runner: ModelRunner,
        decoder: FusedDecoder,
        rule: Rule,
        vocab_size: int,
        ring: LogitsRing,
        stream: Stream,
    ) -> None:
        self._page_size, self._device = runner.page_size, runner.queue.device
        self._width, self._dtype = runner.model.config.vocab_size, runner.model.weights.embedding.dtype
        self._rule, self._ring = rule, ring
        self._window = FusedWindow(decoder, vocab_size, stream)
        self._batches = SamplingBatches(self._device, for_draft=True)

    def draft(self, work: Sequence[DraftWork]) -> tuple[Windows, int]:
        """Windows of those that draft, and how many forwards they took. No token's logits may depend on the host."""
        lists = BatchLists.of([item.forward for item in work], self._page_size)
        batch = upload_batch(lists.arrays(), self._device)
        rows = [self._ring.window_rows(item, self._rule) for item in work]
        drawn = self._window.draft(batch, self._window_batch(work))
        tokens, logprobs = (values.tolist() for values in drawn)
        windows = {
            item.forward.state.request_id: tuple(map(Drafted, tokens[i], logprobs[i], rows[i]))
            for i, item in enumerate(work)
            if item.num_draft
        }
        return windows, max(1, len(tokens[0]))

    def _window_batch(self, work: Sequence[DraftWork]) -> WindowBatch:
        counts = [item.num_draft for item in work]
        states = [item.forward.state for item in work]
        bases = [self._ring.base(s.lane) if keeps_logits(s.params, self._rule) else -1 for s in states]
        num_draft, ring_base = upload([array(counts, torch.int64), array(bases, torch.int64)], self._device)
        ring = self._ring.allocate(self._width, self._dtype, self._device) if max(bases) >= 0 else None
        return WindowBatch(num_draft, max(counts), self._batches.tensors(states), ring, self._ring.size, ring_base)

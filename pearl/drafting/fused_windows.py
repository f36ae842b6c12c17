"""Windows that a CPU drafts in one call."""

from __future__ import annotations

from collections.abc import Sequence

from pearl.drafting.logits_ring import LogitsRing, keeps_logits
from pearl.messages import Drafted, DraftWork, Windows
from pearl.models import FusedDecoder, FusedWindow, WindowRing
from pearl.sampling_batch import SamplingBatches
from pearl.workers import ModelRunner
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
        self._rule, self._ring = rule, ring
        self._width, self._dtype = runner.model.config.vocab_size, runner.model.weights.embedding.dtype
        self._window = FusedWindow(decoder, vocab_size, stream)
        self._batches = SamplingBatches(runner.queue.device, for_draft=True)

    def draft(self, work: Sequence[DraftWork]) -> tuple[Windows, int]:
        """Windows of those that draft, and how many forwards they took. No token's logits may depend on the host."""
        states = [item.forward.state for item in work]
        tokens, logprobs = self._window.draft(work, self._batches.tensors(states), self._window_ring(work))
        windows = {
            item.forward.state.request_id: tuple(
                map(Drafted, tokens[i], logprobs[i], self._ring.window_rows(item, self._rule))
            )
            for i, item in enumerate(work)
            if item.num_draft
        }
        return windows, max(1, *(item.num_draft for item in work))

    def _window_ring(self, work: Sequence[DraftWork]) -> WindowRing:
        states = [item.forward.state for item in work]
        bases = [self._ring.base(s.lane) if keeps_logits(s.params, self._rule) else -1 for s in states]
        logits = self._ring.allocate(self._width, self._dtype) if max(bases) >= 0 else None
        return WindowRing(logits, self._ring.size, bases)

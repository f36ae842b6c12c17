"""A small language model as drafter."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from pearl.engine.logits_processing import process_row
from pearl.host_tensors import from_numbers
from pearl.messages import Busy, Drafted, DraftPlan, DraftProposal, DraftWork
from pearl.sampling_batch import SamplingBatches, draft_temperature
from pearl.workers.model_runner import ModelRunner
from pearl_kernels import Rule, SamplingTensors, Stream


class LogitsRing:
    """Raw logits of drafted tokens until they are decided: the rejection rule needs q where it rejects.

    Token at position p of lane l lives in row ``l * size + p % size``. At most ``window`` tokens are pending while as
    many are being drafted, so ``size = 2 * window`` never overwrites a live row. Greedy and coupled requests need no
    q and store nothing; the buffer is only allocated when a request first does.
    """

    def __init__(self, lanes: int, window: int) -> None:
        self._lanes, self._size = lanes, 2 * window
        self.logits: Tensor | None = None

    def store(self, lane: int, position: int, row: Tensor) -> int:
        if self.logits is None:
            self.logits = row.new_empty(self._lanes * self._size, row.shape[-1])
        index = lane * self._size + position % self._size
        self.logits[index] = row
        return index


class ModelDrafter:
    reads_history = False

    def __init__(
        self,
        runner: ModelRunner,
        rule: Rule,
        vocab_size: int,
        eos_ids: Collection[int],
        ring: LogitsRing,
        device: torch.device,
    ) -> None:
        self._runner, self._rule, self._vocab_size, self._eos_ids = runner, rule, vocab_size, eos_ids
        self._ring, self._device = ring, device
        self._batches = SamplingBatches(device, for_draft=True)
        # Under the coupled rule both models use one noise; under rejection the draft's must be its own.
        self._stream = Stream.SAMPLE if rule == "coupled" else Stream.DRAFT

    def propose(self, plan: DraftPlan) -> DraftProposal:
        if not plan.work:
            return DraftProposal()
        begin = time.perf_counter()
        self._runner.copy_pages(plan.copies)
        logits = self._runner.forward([item.forward for item in plan.work])
        # Longest windows first: the sequences still drafting are always a prefix of the batch.
        drafting = [item for item in plan.work if item.num_draft]
        order = sorted(range(len(drafting)), key=lambda i: -drafting[i].num_draft)
        if order != list(range(len(order))):
            logits = logits[torch.tensor(order, device=self._device)]
        active = [drafting[i] for i in order]
        windows: dict[int, list[Drafted]] = {item.forward.state.request_id: [] for item in active}
        steps = 1
        if active:
            steps = self._draft(active, logits, windows)
        proposed = {request_id: tuple(window) for request_id, window in windows.items()}
        return DraftProposal(proposed, self._ring.logits, steps, Busy.since(begin))

    def _draft(self, active: list[DraftWork], logits: Tensor, windows: dict[int, list[Drafted]]) -> int:
        params = self._batches.tensors([item.forward.state for item in active])
        longest = active[0].num_draft
        for step in range(longest):
            positions = [item.forward.end + step for item in active]
            drafted = self._sample(active, logits, positions, params, windows)
            active = [item for item in active if item.num_draft > step + 1]
            if not active:
                break
            if len(active) < params.seed.shape[0]:
                params = params[torch.arange(len(active), device=self._device)]
            tables = [item.forward.block_table for item in active]
            logits = self._runner.decode(drafted[: len(active)], positions[: len(active)], tables)
        return longest

    def _sample(
        self,
        active: Sequence[DraftWork],
        logits: Tensor,
        positions: Sequence[int],
        params: SamplingTensors,
        windows: dict[int, list[Drafted]],
    ) -> list[int]:
        """Draw one token for each row and append it to its window."""
        for row, item in enumerate(active):
            state = item.forward.state
            if state.params.changes_logits:
                assert state.history is not None
                drafted = (d.token for d in windows[state.request_id])
                process_row(logits[row], state, (*state.history, *drafted), self._eos_ids)
        where = from_numbers(positions, torch.int64, self._device)
        sampled = self._runner.kernels.sample(logits, params, where, self._vocab_size, self._stream)
        tokens: list[int] = sampled.tokens.tolist()
        logprobs: list[float] = sampled.logprobs.tolist()
        for row, item in enumerate(active):
            state = item.forward.state
            index = -1
            if self._rule == "rejection" and state.params.temperature > 0 and draft_temperature(state.params) > 0:
                index = self._ring.store(state.lane, positions[row], logits[row])
            windows[state.request_id].append(Drafted(tokens[row], logprobs[row], index))
        return tokens

"""A small language model as drafter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from pearl.drafting.fused_window import FusedWindows, can_fuse_windows
from pearl.drafting.logits_ring import LogitsRing, keeps_logits
from pearl.drafting.window_graph import WindowGraphs, divide
from pearl.engine.logits_processing import process_row
from pearl.host_tensors import from_numbers, start_download
from pearl.messages import DeviceWindows, Drafted, DraftPlan, DraftProposal, DraftWork, Mark, Windows
from pearl.sampling_batch import SamplingBatches
from pearl.workers import GraphRunner, ModelRunner
from pearl_kernels import Rule, SamplingTensors, Stream


class ModelDrafter:
    reads_history = False

    def __init__(
        self, runner: ModelRunner, rule: Rule, vocab_size: int, eos_ids: Collection[int], ring: LogitsRing
    ) -> None:
        self._runner, self._rule, self._vocab_size, self._eos_ids = runner, rule, vocab_size, eos_ids
        self._ring, self._device = ring, runner.queue.device
        self._batches = SamplingBatches(self._device, for_draft=True)
        # Under the coupled rule both models use one noise; under rejection the draft's must be its own.
        self._stream = Stream.SAMPLE if rule == "coupled" else Stream.DRAFT
        self._graphs: WindowGraphs | None = None
        self._fused: FusedWindows | None = None
        self._stored: Mark | None = None  # the end of what was stored in the ring from here, not by a captured window
        if isinstance(runner, GraphRunner):
            self._graphs = WindowGraphs(runner, rule, vocab_size, ring, self._stream)
        elif runner.fused is not None and can_fuse_windows(runner.kernels):
            self._fused = FusedWindows(runner, runner.fused, rule, vocab_size, ring, self._stream)

    def propose(self, plan: DraftPlan) -> DraftProposal:
        if not plan.work:
            return DraftProposal()
        self._runner.stopwatch.reset()
        self._runner.copy_pages(plan.copies)
        windows, steps, late = self._draft(plan.work)
        return DraftProposal(windows, self._ring.logits, steps, self._runner.stopwatch.stop(), late, self._stored)

    def captures(self) -> Sequence[Callable[[], object]]:
        """As of ``ModelRunner.captures``: windows, and the first forwards of those that are drafted from the host."""
        return [] if self._graphs is None else [*self._graphs.captures(), *self._runner.captures()]

    def waits(self, plan: DraftPlan) -> bool:
        if not self._runner.queue.asynchronous:
            return False
        return any(
            item.num_draft and (self._graphs is None or item.forward.state.params.changes_logits) for item in plan.work
        )

    def _draft(self, work: tuple[DraftWork, ...]) -> tuple[Windows, int, DeviceWindows | None]:
        """Windows, how many forwards they took, and windows that a device still drafts."""
        if self._graphs is not None:
            on_host, on_device = divide(work)
            windows, steps = self._draft_on_host(on_host) if on_host else ({}, 0)
            late = self._graphs.draft(on_device) if on_device else None
            return windows, steps + (late.steps if late is not None else 0), late
        if self._fused is None or any(item.forward.state.params.changes_logits for item in work):
            return *self._draft_on_host(work), None
        self._runner.stopwatch.start()
        return *self._fused.draft(work), None

    def _draft_on_host(self, work: Sequence[DraftWork]) -> tuple[Windows, int]:
        """Windows, and how many forwards they took. Each token is read before the next forward begins."""
        logits = self._runner.forward([item.forward for item in work])
        # Longest windows first: the sequences still drafting are always a prefix of the batch.
        drafting = [item for item in work if item.num_draft]
        if not drafting:
            return {}, 1
        order = sorted(range(len(drafting)), key=lambda i: -drafting[i].num_draft)
        if order != list(range(len(order))):
            logits = logits[from_numbers(order, torch.int64, self._device)]
        active = [drafting[i] for i in order]
        windows: dict[int, list[Drafted]] = {item.forward.state.request_id: [] for item in active}
        steps = self._draft_step_by_step(active, logits, windows)
        self._stored = self._runner.queue.mark()
        return {request_id: tuple(window) for request_id, window in windows.items()}, steps

    def _draft_step_by_step(self, active: list[DraftWork], logits: Tensor, windows: dict[int, list[Drafted]]) -> int:
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
        dtype = logits.dtype
        logits = self._process(active, logits, windows)
        where = from_numbers(positions, torch.int64, self._device)
        sampled = self._runner.kernels.sample(logits, params, where, self._vocab_size, self._stream)
        on_host = start_download((sampled.tokens, sampled.logprobs))
        self._runner.queue.mark().wait()  # once, for both
        tokens: list[int] = on_host[0].tolist()
        logprobs: list[float] = on_host[1].tolist()
        for row, item in enumerate(active):
            state = item.forward.state
            index = -1
            if keeps_logits(state.params, self._rule):
                index = self._ring.store(state.lane, positions[row], logits[row].to(dtype))
            windows[state.request_id].append(Drafted(tokens[row], logprobs[row], index))
        return tokens

    def _process(self, active: Sequence[DraftWork], logits: Tensor, windows: Mapping[int, Sequence[Drafted]]) -> Tensor:
        """The rows to draw from: in fp32 where any are changed, but as the ring can keep q, which was drawn from."""
        dtype = logits.dtype
        changed = [row for row, item in enumerate(active) if item.forward.state.params.changes_logits]
        if changed:
            logits = logits.float()
        for row in changed:
            state = active[row].forward.state
            assert state.history is not None
            drafted = (d.token for d in windows[state.request_id])
            process_row(logits[row], state, (*state.history, *drafted), self._eos_ids)
            if keeps_logits(state.params, self._rule):
                logits[row] = logits[row].to(dtype)
        return logits

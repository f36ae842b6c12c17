"""A model with its KV cache: turns the engine's work items into one ragged forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pearl.host_tensors import Array, from_numbers, upload
from pearl.kv import PageCopy
from pearl.messages import ForwardWork, TargetOutput, TargetPlan
from pearl.models import CausalModel, ForwardBatch, FusedDecoder, HiddenStates, KVCache, can_fuse
from pearl.workers.batch_arrays import BatchLists
from pearl.workers.queue import DeviceQueue
from pearl.workers.stopwatch import Stopwatch


class ModelRunner:
    """Belongs to one worker; nothing else touches the model's weights or KV tensors while it runs."""

    def __init__(
        self,
        model: CausalModel,
        cache: KVCache,
        page_size: int,
        queue: DeviceQueue,
        threads: int = 1,
        hidden_layers: tuple[int, ...] = (),
        beside: int | None = None,
    ) -> None:
        """``threads``: of a fused forward, the calling one included; ``beside``: while it shares cores with another
        model, None: as many. ``hidden_layers``: whose states ``hidden`` has.
        """
        self.model, self.cache, self.page_size, self.queue = model, cache, page_size, queue
        self.kernels = model.kernels
        self.stopwatch = Stopwatch(queue)
        # Where it is there, a forward is one call, with threads of its own.
        self.fused = FusedDecoder(model, cache, threads, beside) if can_fuse(model) else None
        self.hidden_layers = hidden_layers
        self.hidden: HiddenStates | None = None  # of the latest forward; None where none are wanted

    def captures(self) -> Sequence[Callable[[], object]]:
        """Calls that prepare what rounds would else have to, each a part, the likeliest first. None computes anything.

        To be called as forwards are, before the first.
        """
        return ()

    def check(self) -> None:
        """Raises if what was computed cannot be trusted: a tensor-parallel model may have lost a rank meanwhile."""

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        if copies:
            pairs = [(c.source, c.destination) for c in copies]
            self.copy_pairs(from_numbers(pairs, torch.int64, self.queue.device))

    def copy_pairs(self, pairs: Tensor) -> None:
        """int64 ``[M, 2]``: source and destination page."""
        self.cache.copy_pages(pairs, self.kernels)

    def forward(self, work: Sequence[ForwardWork]) -> Tensor:
        """Compute every item's tokens; returns the wanted logits ``[sum of num_logits, V]`` in the items' order."""
        if self.fused is not None:
            self.stopwatch.start()
            return self.fused.forward_work(work, self._new_hidden(sum(len(item.tokens) for item in work)))
        return self.launch(BatchLists.of(work, self.page_size).arrays())

    def decode(self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[tuple[int, ...]]) -> Tensor:
        """One token for each sequence; returns logits ``[R, V]``."""
        size, rows = self.page_size, range(len(tokens))
        lists = BatchLists(
            input_ids=list(tokens),
            positions=list(positions),
            slot_mapping=[tables[i][p // size] * size + p % size for i, p in enumerate(positions)],
            block_tables=list(tables),
            query_start=list(range(len(tokens) + 1)),
            context_lens=[p + 1 for p in positions],
            logits_rows=list(rows),
        )
        return self.launch(lists.arrays())

    def launch(self, arrays: Mapping[str, Array]) -> Tensor:
        """Compute the batch that has these arrays (``BatchLists.arrays``); returns its logits."""
        return self.compute(upload_batch(arrays, self.queue.device))

    def compute(self, batch: ForwardBatch) -> Tensor:
        """Logits ``[M, V]`` of batch.logits_rows."""
        self.stopwatch.start()
        hidden = self._new_hidden(batch.input_ids.shape[0])
        if self.fused is not None:
            return self.fused.forward(batch, hidden)
        return self.model.forward(batch, self.cache, hidden)

    def _new_hidden(self, rows: int) -> HiddenStates | None:
        if self.hidden_layers:
            self.hidden = self.model.new_hidden(rows, self.hidden_layers)
        return self.hidden


def build_batch(work: Sequence[ForwardWork], page_size: int, device: torch.device) -> ForwardBatch:
    return upload_batch(BatchLists.of(work, page_size).arrays(), device)


def upload_batch(arrays: Mapping[str, Array], device: torch.device) -> ForwardBatch:
    rows = arrays["query_start"][1:] - arrays["query_start"][:-1]
    return ForwardBatch(*upload(list(arrays.values()), device), most_rows=int(rows.max(initial=0)))


class TargetRunner:
    """The target's side of a round."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def run(self, plan: TargetPlan) -> TargetOutput:
        if not plan.work:
            return TargetOutput(None)
        self._runner.stopwatch.reset()
        self._runner.copy_pages(plan.copies)
        logits = self._runner.forward(plan.work)
        hidden = None if self._runner.hidden is None else self._runner.hidden.rows
        return TargetOutput(logits, self._runner.stopwatch.stop(), hidden)

    def check(self) -> None:
        self._runner.check()

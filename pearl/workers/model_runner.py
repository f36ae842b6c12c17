"""A model with its KV cache: turns the engine's work items into one ragged forward."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pearl.host_tensors import from_numbers
from pearl.kv import PageCopy
from pearl.messages import Busy, ForwardWork, TargetOutput, TargetPlan
from pearl.models import Decoder, ForwardBatch, FusedDecoder, KVCache, can_fuse


class ModelRunner:
    """Belongs to one worker; nothing else touches the model's weights or KV tensors while it runs."""

    def __init__(self, model: Decoder, cache: KVCache, page_size: int, device: torch.device, threads: int = 1) -> None:
        """``threads``: of a fused forward, the calling one included."""
        self.model, self.cache = model, cache
        self.kernels = model.kernels
        self._page_size, self._device = page_size, device
        self._fused = FusedDecoder(model, cache, threads) if can_fuse(model) else None

    @property
    def is_fused(self) -> bool:
        """Whether a forward is one call, with threads of its own."""
        return self._fused is not None

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        if copies:
            self.copy_pairs(torch.tensor([(c.source, c.destination) for c in copies], device=self._device))

    def copy_pairs(self, pairs: Tensor) -> None:
        """int64 ``[M, 2]``: source and destination page."""
        self.cache.copy_pages(pairs, self.kernels)

    def forward(self, work: Sequence[ForwardWork]) -> Tensor:
        """Compute every item's tokens; returns the wanted logits ``[sum of num_logits, V]`` in the items' order."""
        return self.compute(build_batch(work, self._page_size, self._device))

    def decode(self, tokens: Sequence[int], positions: Sequence[int], tables: Sequence[tuple[int, ...]]) -> Tensor:
        """One token for each sequence; returns logits ``[R, V]``."""
        size, rows = self._page_size, range(len(tokens))
        batch = ForwardBatch(
            input_ids=self._ints(tokens),
            positions=self._ints(positions),
            slot_mapping=self._ints([tables[i][p // size] * size + p % size for i, p in enumerate(positions)]),
            block_tables=_block_tables(tables, self._device),
            query_start=self._ints(range(len(tokens) + 1), torch.int32),
            context_lens=self._ints([p + 1 for p in positions], torch.int32),
            logits_rows=self._ints(rows),
        )
        return self.compute(batch)

    def compute(self, batch: ForwardBatch) -> Tensor:
        """Logits ``[M, V]`` of batch.logits_rows."""
        return self.model.forward(batch, self.cache) if self._fused is None else self._fused.forward(batch)

    def _ints(self, values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return from_numbers(values, dtype, self._device)


def build_batch(work: Sequence[ForwardWork], page_size: int, device: torch.device) -> ForwardBatch:
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts: list[int] = [0]
    contexts: list[int] = []
    logits_rows: list[int] = []
    for item in work:
        tokens.extend(item.tokens)
        span = range(item.start, item.end)
        positions.extend(span)
        slots.extend(item.block_table[p // page_size] * page_size + p % page_size for p in span)
        contexts.append(item.end)
        logits_rows.extend(range(len(tokens) - item.num_logits, len(tokens)))
        starts.append(len(tokens))
    return ForwardBatch(
        input_ids=from_numbers(tokens, torch.int64, device),
        positions=from_numbers(positions, torch.int64, device),
        slot_mapping=from_numbers(slots, torch.int64, device),
        block_tables=_block_tables([item.block_table for item in work], device),
        query_start=from_numbers(starts, torch.int32, device),
        context_lens=from_numbers(contexts, torch.int32, device),
        logits_rows=from_numbers(logits_rows, torch.int64, device),
    )


def _block_tables(tables: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    """int32 ``[R, B]``; short tables are padded with -1, which no kernel reads."""
    longest = max(map(len, tables))
    padded = [table + (-1,) * (longest - len(table)) for table in tables]
    return from_numbers(padded, torch.int32, device)


class TargetRunner:
    """The target's side of a round."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner

    def run(self, plan: TargetPlan) -> TargetOutput:
        if not plan.work:
            return TargetOutput(None)
        begin = time.perf_counter()
        self._runner.copy_pages(plan.copies)
        logits = self._runner.forward(plan.work)
        return TargetOutput(logits, Busy.since(begin))

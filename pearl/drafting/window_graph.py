"""A whole window drafted in one captured call: forward, draw, forward, draw, ... with no host in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.drafting.logits_ring import LogitsRing
from pearl.host_tensors import Array, array, start_download
from pearl.messages import DeviceWindows, DraftWork
from pearl.models import ForwardBatch
from pearl.sampling_batch import sampling_arrays
from pearl.workers.batch_arrays import DTYPES, BatchLists, BatchShape, bucket
from pearl.workers.graph_runner import GraphRunner
from pearl.workers.graphs import Graphs
from pearl_kernels import Rule, SamplingTensors, Stream

_MOST_GRAPHS = 32  # each as many forwards as its window is long
_CATCH_UP = 2  # tokens of a request that the draft may still have to compute: after a bonus token two


class _Key(NamedTuple):
    shape: BatchShape
    steps: int
    stores: bool  # q of some request is kept


class _Drawn(NamedTuple):
    tokens: Tensor  # int64 [steps, sequences]
    logprobs: Tensor  # fp32


def divide(work: Sequence[DraftWork]) -> tuple[tuple[DraftWork, ...], tuple[DraftWork, ...]]:
    """What to compute from the host first, and what a captured window can do after it.

    Prompts are computed from the host, but for their last token; and windows in which each token's logits depend on
    the host (penalties and the like) are drafted there.
    """
    on_host: list[DraftWork] = []
    on_device: list[DraftWork] = []
    for item in work:
        forward = item.forward
        if not item.num_draft or forward.state.params.changes_logits:
            on_host.append(item)
            continue
        if len(forward.tokens) > _CATCH_UP:
            on_host.append(DraftWork(forward._replace(tokens=forward.tokens[:-1], num_logits=0), 0))
            item = DraftWork(forward._replace(tokens=forward.tokens[-1:], start=forward.end - 1), item.num_draft)
        on_device.append(item)
    return tuple(on_host), tuple(on_device)


class WindowGraphs:
    """Of one drafter. Every request drafts as many tokens as the longest window; what a shorter one has too many is
    drafted from the state that its last token left, written nowhere, and not looked at.
    """

    def __init__(self, runner: GraphRunner, rule: Rule, vocab_size: int, ring: LogitsRing, stream: Stream) -> None:
        self._runner, self._rule, self._vocab_size = runner, rule, vocab_size
        self._ring, self._stream = ring, stream
        self._graphs: Graphs[_Drawn] = Graphs(runner.queue, _MOST_GRAPHS)

    def draft(self, work: Sequence[DraftWork]) -> DeviceWindows:
        """Enqueue the windows of ``work``, at least one item, as ``divide`` makes them."""
        rows = {item.forward.state.request_id: self._ring.window_rows(item, self._rule) for item in work}
        steps = max(item.num_draft for item in work)
        lists = BatchLists.of([item.forward for item in work], self._runner.page_size)
        shape = lists.shape(self._runner.page_size)
        if len(lists.input_ids) > len(work):
            # A decoder that is asked for as many logits as it has rows takes them as they are: here some are left out.
            shape = shape._replace(rows=max(shape.rows, bucket(shape.sequences + 1)))
        key = _Key(shape, steps, any(kept[0] >= 0 for kept in rows.values()))
        arrays = self._arrays(work, rows, lists, shape)
        drawn = self._graphs.run(key, arrays, lambda inputs: self._bind(key, inputs))
        tokens, logprobs = start_download(drawn)
        return DeviceWindows(rows, *drawn, tokens, logprobs, self._runner.queue.mark())

    def _arrays(
        self, work: Sequence[DraftWork], rows: Mapping[int, Sequence[int]], lists: BatchLists, shape: BatchShape
    ) -> dict[str, Array]:
        padding = shape.sequences - len(work)
        lists.pad(shape)
        lists.logits_rows += [0] * padding
        states = [item.forward.state for item in work]
        bases = [self._ring.base(s.lane) if rows[s.request_id][0] >= 0 else -1 for s in states]
        return {
            **lists.arrays(),
            # Padding decodes position 1 of page 0, and writes nothing: its window is one token long.
            "end": array([*(item.forward.end for item in work), *[1] * padding], torch.int64),
            "last": array([*(item.num_draft - 1 for item in work), *[0] * padding], torch.int64),
            "ring_base": array([*bases, *[-1] * padding], torch.int64),
            **sampling_arrays(states, for_draft=True, padding=padding),
        }

    def _bind(self, key: _Key, inputs: Mapping[str, Tensor]) -> tuple[Callable[[], None], _Drawn]:
        sequences, device = key.shape.sequences, self._runner.queue.device
        drawn = _Drawn(
            torch.empty((key.steps, sequences), dtype=torch.int64, device=device),
            torch.empty((key.steps, sequences), dtype=torch.float32, device=device),
        )
        params = SamplingTensors(**{name: inputs[name] for name in SamplingTensors.__dataclass_fields__})
        first = ForwardBatch(**{name: inputs[name] for name in DTYPES})
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        every = torch.arange(sequences, device=device)
        tables = first.block_tables[:sequences]
        end, last, base = inputs["end"], inputs["last"], inputs["ring_base"]

        def call() -> None:
            logits = self._forward(first)
            for step in range(key.steps):
                position = end + last.clamp(max=step)
                sampled = self._runner.kernels.sample(logits, params, position, self._vocab_size, self._stream)
                drawn.tokens[step].copy_(sampled.tokens)
                drawn.logprobs[step].copy_(sampled.logprobs)
                if key.stores:
                    self._store(logits, position, base, last >= step)
                if step + 1 < key.steps:
                    # A window that has ended sees what its last token saw; that token itself is not computed.
                    lives = last > step
                    slots = self._slots(tables, position, lives)
                    contexts = (position + lives).to(torch.int32)
                    logits = self._forward(
                        ForwardBatch(drawn.tokens[step], position, slots, tables, starts, contexts, every)
                    )

        return call, drawn

    def _forward(self, batch: ForwardBatch) -> Tensor:
        return self._runner.model.forward(batch, self._runner.cache)

    def _slots(self, tables: Tensor, position: Tensor, lives: Tensor) -> Tensor:
        size = self._runner.page_size
        page = (position // size).clamp(max=tables.shape[1] - 1)
        slot = tables.gather(1, page[:, None])[:, 0] * size + position % size
        return torch.where(lives, slot, -1)

    def _store(self, logits: Tensor, position: Tensor, base: Tensor, lives: Tensor) -> None:
        ring = self._ring.allocate(logits.shape[-1], logits.dtype, logits.device)
        row = torch.where(lives & (base >= 0), base + position % self._ring.size, self._ring.spare_row)
        ring.index_copy_(0, row, logits)

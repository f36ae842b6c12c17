"""Windows drafted by captured calls: forward, draw, forward, draw, ... with no host in between."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.drafting.logits_ring import LogitsRing
from pearl.host_tensors import Array, array, start_download
from pearl.messages import DeviceWindows, DraftWork, DrawnTokens
from pearl.models import ForwardBatch
from pearl.sampling_batch import sampling_arrays
from pearl.workers.batch_arrays import DTYPES, BatchLists
from pearl.workers.graph_runner import GraphRunner
from pearl.workers.graphs import Calls, Graphs
from pearl.workers.shapes import BatchShape, row_bucket
from pearl_kernels import Rule, SamplingTensors, Stream

_MOST_GRAPHS = 192  # each has two forwards
_CATCH_UP = 2  # tokens of a request that the draft may still have to compute: after a bonus token two


class _Key(NamedTuple):
    shape: BatchShape
    stores: bool  # q of some request is kept


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
    """Of one drafter. Two captured calls draft windows of any length: one catches up and draws the first token, the
    other, repeated, draws one more. So no graph depends on how long windows are, and whoever waits for first tokens
    need not wait for the rest.

    Every request drafts as many tokens as the longest window; what a shorter one has too many is drafted from the
    state that its last token left, written nowhere, and not looked at.
    """

    def __init__(self, runner: GraphRunner, rule: Rule, vocab_size: int, ring: LogitsRing, stream: Stream) -> None:
        self._runner, self._rule, self._vocab_size = runner, rule, vocab_size
        self._ring, self._stream = ring, stream
        self._graphs: Graphs[DrawnTokens] = Graphs(runner.queue, _MOST_GRAPHS)

    def draft(self, work: Sequence[DraftWork]) -> DeviceWindows:
        """Enqueue the windows of ``work``, at least one item, as ``divide`` makes them."""
        rows = {item.forward.state.request_id: self._ring.window_rows(item, self._rule) for item in work}
        steps = max(item.num_draft for item in work)
        lists = BatchLists.of([item.forward for item in work], self._runner.page_size)
        shape = self._shape(len(work), max(len(item.forward.block_table) for item in work))
        key = _Key(shape, any(kept[0] >= 0 for kept in rows.values()))
        arrays = self._arrays(work, rows, lists, shape)
        graph = self._graphs.ready(key, arrays, lambda inputs: self._bind(key, inputs))
        drawn = DrawnTokens(graph.outputs.packed[:steps])
        self._runner.stopwatch.start()
        graph.replays[0]()
        first_ready = self._runner.queue.mark()
        for _ in range(1, steps):
            graph.replays[1]()
        (on_host,) = start_download([drawn.packed])
        return DeviceWindows(rows, drawn, DrawnTokens(on_host), first_ready, self._runner.queue.mark())

    def captures(self) -> Sequence[Callable[[], object]]:
        """One for each key that can come up, as of ``ModelRunner.captures``."""
        sequences = sorted({row_bucket(count) for count in range(1, self._ring.lanes + 1)})
        keeps = (False, True) if self._rule != "coupled" else (False,)
        keys = itertools.product(self._runner.limits.widths(), sequences, keeps)
        return [
            partial(self._capture, _Key(self._shape(count, pages), stores))
            for pages, count, stores in itertools.islice(keys, _MOST_GRAPHS)
        ]

    def _capture(self, key: _Key) -> None:
        arrays = self._arrays([], {}, BatchLists.of([], self._runner.page_size), key.shape)
        self._graphs.ready(key, arrays, partial(self._bind, key))

    def _shape(self, sequences: int, pages: int) -> BatchShape:
        """Rows for as much as each may have to catch up on: they cost a forward next to nothing."""
        sequences = row_bucket(sequences)
        return self._runner.limits.shape(_CATCH_UP * sequences, sequences, pages)._replace(sequences=sequences)

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

    def _bind(self, key: _Key, inputs: Mapping[str, Tensor]) -> tuple[Calls, DrawnTokens]:
        sequences, device, longest = key.shape.sequences, self._runner.queue.device, self._ring.window
        drawn = DrawnTokens(torch.empty((longest, 2, sequences), dtype=torch.int64, device=device))
        params = SamplingTensors(**{name: inputs[name] for name in SamplingTensors.__dataclass_fields__})
        first = ForwardBatch(**{name: inputs[name] for name in DTYPES}, most_rows=_CATCH_UP)
        step = torch.zeros(1, dtype=torch.int64, device=device)  # how many tokens each window has, but for this one
        starts = torch.arange(sequences + 1, dtype=torch.int32, device=device)
        every = torch.arange(sequences, device=device)
        tables = first.block_tables[:sequences]
        end, last, base = inputs["end"], inputs["last"], inputs["ring_base"]

        def draw(logits: Tensor) -> None:
            position = end + torch.minimum(last, step)
            sampled = self._runner.kernels.sample(logits, params, position, self._vocab_size, self._stream)
            drawn.tokens.index_copy_(0, step, sampled.tokens[None])
            drawn.logprobs.index_copy_(0, step, sampled.logprobs[None])
            if key.stores:
                self._store(logits, position, base, last >= step)

        def begin() -> None:
            step.zero_()
            draw(self._forward(first))

        def go_on() -> None:
            position = end + torch.minimum(last, step)
            # A window that has ended sees what its last token saw; that token itself is not computed.
            lives = last > step
            slots, contexts = self._slots(tables, position, lives), (position + lives).to(torch.int32)
            tokens = drawn.tokens.index_select(0, step)[0]
            batch = ForwardBatch(tokens, position, slots, tables, starts, contexts, every, most_rows=1)
            logits = self._forward(batch)
            step.add_(1).clamp_(max=longest - 1)  # to be captured it may run once more than any window is long
            draw(logits)

        return ((begin, go_on) if longest > 1 else (begin,)), drawn

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

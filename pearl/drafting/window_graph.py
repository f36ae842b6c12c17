"""Windows drafted by captured calls: forward, draw, forward, draw, ... with no host in between."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from pearl.drafting.draft_rows import DraftRow, draft_rows
from pearl.drafting.logits_ring import LogitsRing
from pearl.drafting.window_calls import CATCH_UP, WindowCalls, WindowKey
from pearl.host_tensors import Array, array, start_download
from pearl.kv import PageCopy
from pearl.messages import DeviceBranch, DeviceWindows, DraftPlan, DraftWork, DrawnTokens
from pearl.sampling_batch import sampling_arrays
from pearl.workers.batch_arrays import BatchLists
from pearl.workers.graph_runner import GraphRunner
from pearl.workers.graphs import Calls, Graphs
from pearl.workers.shapes import BatchShape, row_bucket
from pearl_kernels import Rule, Stream
from pearl_kernels.reference import MOST_ALTERNATIVES

_MOST_GRAPHS = 192  # each has two forwards
_BEGIN, _GO_ON, _JOIN = range(3)  # of a graph's calls


def divide(plan: DraftPlan) -> tuple[DraftPlan, DraftPlan]:
    """What to compute from the host first, and what a captured window can do after it.

    Prompts are computed from the host, but for their last token; and windows in which each token's logits depend on
    the host (penalties and the like) are drafted there. Branches are drafted where their request is. What the plan
    wants copied before all of it is in neither.
    """
    on_host: list[DraftWork] = []
    on_device: list[DraftWork] = []
    for item in plan.work:
        forward = item.forward
        if not item.num_draft or forward.state.params.changes_logits:
            on_host.append(item)
            continue
        if len(forward.tokens) > CATCH_UP:
            on_host.append(DraftWork(forward._replace(tokens=forward.tokens[:-1], num_logits=0), 0))
            item = item._replace(forward=forward._replace(tokens=forward.tokens[-1:], start=forward.end - 1))
        on_device.append(item)
    first, second = (
        replace(plan, work=tuple(work), copies=(), late_copies=_late_copies(work, plan.late_copies))
        for work in (on_host, on_device)
    )
    return first, second


def _late_copies(work: Sequence[DraftWork], copies: Sequence[PageCopy]) -> tuple[PageCopy, ...]:
    """Those that are for late branches of ``work``."""
    pages = {page for item in work for branch in item.branches if branch.token is None for page in branch.block_table}
    return tuple(copy for copy in copies if copy.destination in pages)


class WindowGraphs:
    """Of one drafter. Captured calls draft windows of any length: one catches up and draws the first token, another,
    repeated, draws one more; where branches join at the second step, a third is between them. So no graph depends on
    how long windows are, and whoever waits for first tokens need not wait for the rest.

    Every sequence drafts as many tokens as the longest window; what a shorter one has too many is drafted from the
    state that its last token left, written nowhere, and not looked at. So is what a late branch draws at the first
    step, where it only keeps its place.
    """

    def __init__(self, runner: GraphRunner, rule: Rule, vocab_size: int, ring: LogitsRing, stream: Stream) -> None:
        self._runner, self._rule, self._vocab_size = runner, rule, vocab_size
        self._ring, self._stream = ring, stream
        self._alternatives = min(ring.most_branches, MOST_ALTERNATIVES)  # as many as any plan may want
        self._graphs: Graphs[DrawnTokens] = Graphs(runner.queue, _MOST_GRAPHS)
        self._buffer: Tensor | None = None  # what is drawn, for all graphs: a round's windows are read in that round

    def draft(self, plan: DraftPlan) -> DeviceWindows:
        """Enqueue the windows of a plan with at least one item, as ``divide`` makes it."""
        rows = draft_rows(plan.work, self._ring, self._rule)
        steps = max(row.wanted for row in rows)
        key = self._key(rows, ranks=plan.alternatives > 0)
        arrays = self._arrays(rows, key, plan.late_copies)
        graph = self._graphs.ready(key, arrays, lambda inputs: self._bind(key, inputs))
        drawn = DrawnTokens(graph.outputs.packed[:steps])
        self._runner.stopwatch.start()
        graph.replays[_BEGIN]()
        first_ready = self._runner.queue.mark()
        if any(row.is_late for row in rows):
            graph.replays[_JOIN]()
        for _ in range(1, steps):
            graph.replays[_GO_ON]()
        (on_host,) = start_download([drawn.packed])
        main = {row.forward.state.request_id: tuple(row.places(row.wanted)) for row in rows if row.branch is None}
        branches = tuple(
            DeviceBranch(row.branch, row.parent, tuple(row.places(row.wanted)[row.is_late :]))
            for row in rows
            if row.branch is not None
        )
        ready = self._runner.queue.mark()
        return DeviceWindows(main, drawn, DrawnTokens(on_host), first_ready, ready, branches, plan.alternatives)

    def captures(self) -> Sequence[Callable[[], object]]:
        """One for each key that can come up, as of ``ModelRunner.captures``."""
        alone, lanes = (0, self._ring.lanes), self._ring.lanes
        ranked = (self._alternatives, lanes + self._ring.most_branches)
        sizes = sorted({
            (row_bucket(count), alternatives)
            for alternatives, most in ((alone, ranked) if self._alternatives else (alone,))
            for count in range(1, most + 1)
        })  # fmt: skip
        keeps = (False, True) if self._rule != "coupled" else (False,)
        keys = itertools.product(self._runner.limits.widths(), sizes, keeps)
        return [
            partial(self._capture, WindowKey(self._shape(count, pages), stores, alternatives))
            for pages, (count, alternatives), stores in itertools.islice(keys, _MOST_GRAPHS)
        ]

    def _capture(self, key: WindowKey) -> None:
        self._graphs.ready(key, self._arrays([], key, ()), partial(self._bind, key))

    def _key(self, rows: Sequence[DraftRow], ranks: bool) -> WindowKey:
        shape = self._shape(len(rows), max(len(row.forward.block_table) for row in rows))
        return WindowKey(shape, any(row.ring_base >= 0 for row in rows), self._alternatives if ranks else 0)

    def _shape(self, sequences: int, pages: int) -> BatchShape:
        """Rows for as much as each request may have to catch up on: they cost a forward next to nothing."""
        sequences = row_bucket(sequences)
        rows = sequences + (CATCH_UP - 1) * min(sequences, self._ring.lanes)
        return self._runner.limits.shape(rows, sequences, pages)._replace(sequences=sequences)

    def _arrays(self, rows: Sequence[DraftRow], key: WindowKey, copies: Sequence[PageCopy]) -> dict[str, Array]:
        padding = key.shape.sequences - len(rows)
        lists = BatchLists.of([row.forward for row in rows], self._runner.page_size)
        for index, row in enumerate(rows):
            if row.is_late:  # it has no rows, and its logits are any
                lists.context_lens[index] = 0
                lists.logits_rows.append(0)
        lists.pad(key.shape)
        lists.logits_rows += [0] * padding
        arrays = {
            **lists.arrays(),
            # Padding decodes position 1 of page 0, and writes nothing: its window is one token long.
            "end": array([*(row.forward.end for row in rows), *[1] * padding], torch.int64),
            "last": array([*(row.wanted - 1 for row in rows), *[0] * padding], torch.int64),
            "drawn_from": array([*(int(row.is_late) for row in rows), *[0] * padding], torch.int64),
            "ring_base": array([*(row.ring_base for row in rows), *[-1] * padding], torch.int64),
            "ring_size": array([*(row.ring_size for row in rows), *[1] * padding], torch.int64),
            **sampling_arrays([row.forward.state for row in rows], for_draft=True, padding=padding),
        }
        return arrays | self._joining(rows, padding, copies) if key.alternatives else arrays

    def _joining(self, rows: Sequence[DraftRow], padding: int, copies: Sequence[PageCopy]) -> dict[str, Array]:
        """What late branches begin with. Of the others the rank is -1."""
        parents = [max(0, row.parent) for row in rows]
        ranks = [row.branch.rank if row.branch is not None and row.is_late else -1 for row in rows]
        # The other pairs copy a page onto itself, which nobody else writes to.
        idle = copies[0].source if copies else 0
        pairs = [(copy.source, copy.destination) for copy in copies]
        pairs += [(idle, idle)] * (self._ring.most_branches - len(pairs))
        return {
            "parent": array([*parents, *[0] * padding], torch.int64),
            "rank": array([*ranks, *[-1] * padding], torch.int64),
            "late_copies": array(pairs, torch.int64),
        }

    def _bind(self, key: WindowKey, inputs: Mapping[str, Tensor]) -> tuple[Calls, DrawnTokens]:
        ring, drawn = self._ring, self._drawn(key)
        window = WindowCalls(key, inputs, drawn, self._runner, ring, self._vocab_size, self._stream)
        calls = (window.begin, window.go_on, window.join)
        return calls[: 1 if ring.window == 1 else 3 if key.alternatives else 2], drawn

    def _drawn(self, key: WindowKey) -> DrawnTokens:
        ring, shape = self._ring, (self._ring.window, 2 + key.alternatives, key.shape.sequences)
        if self._buffer is None:
            largest = ring.window * (2 + self._alternatives) * row_bucket(ring.lanes + ring.most_branches)
            self._buffer = torch.empty(largest, dtype=torch.int64, device=self._runner.queue.device)
        return DrawnTokens(self._buffer[: math.prod(shape)].view(shape))

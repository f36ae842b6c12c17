"""A ``ModelRunner`` whose decoding and verification forwards are replayed graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from pearl.host_tensors import Array
from pearl.messages import ForwardWork
from pearl.models import Decoder, ForwardBatch, KVCache
from pearl.workers.batch_arrays import DTYPES, BatchLists
from pearl.workers.graphs import Calls, Graphs
from pearl.workers.model_runner import ModelRunner
from pearl.workers.queue import DeviceQueue
from pearl.workers.shapes import BatchShape, ShapeLimits, row_bucket
from pearl_kernels import KernelSet

_MOST_GRAPHS = 256  # a forward of a 32-layer model is about 300 nodes, one or two megabytes
# Of these some providers wait for the device, or read index tensors on the host; the others never do.
_ASYNCHRONOUS = {"verify_attention": ("cuda", "triton"), "rope_and_cache": ("cuda", "triton"), "sample": ("triton",)}


def why_not_captured(kernels: KernelSet) -> str | None:
    """None, or the sentence that says which operator keeps a forward from being captured."""
    for op, providers in _ASYNCHRONOUS.items():
        if kernels.providers[op] not in providers:
            return (
                f"{op} runs on {kernels.providers[op]!r}, which may wait for the device; {' or '.join(providers)} never"
            )
    return None


class GraphRunner(ModelRunner):
    """Rounds in which every row's logits are wanted, up to ``most_rows``, are replayed; prompts run eagerly.
    With ``most_rows`` 0 everything does.

    The returned logits lie in one buffer, valid until the next forward.
    """

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        page_size: int,
        queue: DeviceQueue,
        most_rows: int,
        most_sequences: int = 0,
        rows_per_sequence: int = 0,
        hidden_layers: tuple[int, ...] = (),
    ) -> None:
        """``most_sequences``, ``rows_per_sequence``: the most that a batch has; 0: as many as rows."""
        super().__init__(model, cache, page_size, queue, hidden_layers=hidden_layers)
        self._graphs: Graphs[None] = Graphs(queue, _MOST_GRAPHS)
        self._most_rows = row_bucket(most_rows) if most_rows else 0
        pages = -(-model.max_model_len // page_size)
        self.limits = ShapeLimits(
            self._most_rows, rows_per_sequence or most_rows, most_sequences or most_rows, pages, page_size
        )
        self._logits: Tensor | None = None  # [most_rows, V], made by the first capture
        self._hidden = model.new_hidden(self._most_rows, hidden_layers) if hidden_layers else None

    def captures(self) -> Sequence[Callable[[], object]]:
        """One for each shape that can come up and has not yet. They write nothing."""
        shapes = self.limits.shapes()[:_MOST_GRAPHS]
        return [partial(self._capture, shape) for shape in shapes if shape not in self._graphs]

    def _capture(self, shape: BatchShape) -> None:
        lists = BatchLists.of([], self.page_size)
        lists.pad(shape)
        lists.logits_rows = list(range(shape.rows))
        self.replay(shape, lists.arrays())

    def forward(self, work: Sequence[ForwardWork]) -> Tensor:
        rows = sum(len(item.tokens) for item in work)
        if rows > self._most_rows or any(self._is_of_prompt(item) for item in work):
            return super().forward(work)
        lists = BatchLists.of(work, self.page_size)
        shape = self.limits.shape(rows, len(work), max(len(item.block_table) for item in work))
        lists.pad(shape)
        lists.logits_rows = list(range(shape.rows))
        logits = self.replay(shape, lists.arrays())[:rows]
        if self._hidden is not None:  # a copy: they are read while the next forward is replayed
            self.hidden = replace(self._hidden, rows=self._hidden.rows[:rows].clone())
        return logits

    def _is_of_prompt(self, item: ForwardWork) -> bool:
        return not len(item.tokens) <= min(item.num_logits, self.limits.rows_per_sequence)

    def replay(self, shape: BatchShape, arrays: Mapping[str, Array]) -> Tensor:
        """Compute a padded batch; returns logits, those of ``shape.rows`` rows first."""
        self._graphs.run(shape, arrays, self._bind, self.stopwatch.start)
        assert self._logits is not None
        return self._logits

    def _bind(self, inputs: Mapping[str, Tensor]) -> tuple[Calls, None]:
        rows, sequences = inputs["input_ids"].shape[0], inputs["context_lens"].shape[0] - 1
        most = self.limits.rows_of_a_sequence(rows, sequences)
        batch = ForwardBatch(**{name: inputs[name] for name in DTYPES}, most_rows=most)
        hidden = None if self._hidden is None else replace(self._hidden, rows=self._hidden.rows[:rows])

        def call() -> None:
            logits = self.model.forward(batch, self.cache, hidden)
            if self._logits is None:
                self._logits = logits.new_empty(self._most_rows, logits.shape[-1])
            self._logits[: logits.shape[0]].copy_(logits)

        return (call,), None

"""A ``ModelRunner`` whose decoding and verification forwards are replayed graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from pearl.host_tensors import Array
from pearl.messages import ForwardWork
from pearl.models import Decoder, ForwardBatch, KVCache
from pearl.workers.batch_arrays import DTYPES, BatchLists, BatchShape, bucket
from pearl.workers.graphs import Graphs
from pearl.workers.model_runner import ModelRunner
from pearl.workers.queue import DeviceQueue
from pearl_kernels import KernelSet

_MOST_GRAPHS = 64  # a forward of a 32-layer model is about 300 nodes
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

    def __init__(self, model: Decoder, cache: KVCache, page_size: int, queue: DeviceQueue, most_rows: int) -> None:
        super().__init__(model, cache, page_size, queue)
        self._graphs: Graphs[None] = Graphs(queue, _MOST_GRAPHS)
        self._most_rows = bucket(most_rows) if most_rows else 0
        self._logits: Tensor | None = None  # [most_rows, V], made by the first capture

    def forward(self, work: Sequence[ForwardWork]) -> Tensor:
        rows = sum(len(item.tokens) for item in work)
        if rows > self._most_rows or any(item.num_logits < len(item.tokens) for item in work):
            return super().forward(work)
        lists = BatchLists.of(work, self.page_size)
        shape = lists.shape(self.page_size)
        lists.pad(shape)
        lists.logits_rows = list(range(shape.rows))
        return self.replay(shape, lists.arrays())[:rows]

    def replay(self, shape: BatchShape, arrays: Mapping[str, Array]) -> Tensor:
        """Compute a padded batch; returns logits, those of ``shape.rows`` rows first."""
        self._graphs.run(shape, arrays, self._bind, self.stopwatch.start)
        assert self._logits is not None
        return self._logits

    def _bind(self, inputs: Mapping[str, Tensor]) -> tuple[Callable[[], None], None]:
        rows, sequences = inputs["input_ids"].shape[0], inputs["context_lens"].shape[0] - 1
        # Of an average sequence, the one apart that takes the padding.
        batch = ForwardBatch(**{name: inputs[name] for name in DTYPES}, most_rows=-(-rows // sequences))

        def call() -> None:
            logits = self.model.forward(batch, self.cache)
            if self._logits is None:
                self._logits = logits.new_empty(self._most_rows, logits.shape[-1])
            self._logits[: logits.shape[0]].copy_(logits)

        return call, None

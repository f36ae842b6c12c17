"""A tensor-parallel model as the engine sees it: rank 0's part here, the other ranks' in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from pearl.host_tensors import Array
from pearl.kv import PageCopy
from pearl.models import Decoder, KVCache
from pearl.parallel.messages import Compute, CopyPages, RankSpec, Replay
from pearl.parallel.rank_loader import host_store, join, load_rank
from pearl.parallel.ranks import Ranks
from pearl.workers.graph_runner import GraphRunner
from pearl.workers.queue import DeviceQueue
from pearl.workers.shapes import BatchShape


class ParallelRunner(GraphRunner):
    """Every command goes to all ranks before this one's part is computed; the logits are whole on this one."""

    def __init__(
        self,
        model: Decoder,
        cache: KVCache,
        page_size: int,
        queue: DeviceQueue,
        most_rows: int,
        ranks: Ranks,
        most_sequences: int = 0,
        rows_per_sequence: int = 0,
    ) -> None:
        super().__init__(model, cache, page_size, queue, most_rows, most_sequences, rows_per_sequence)
        self._ranks = ranks

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        if copies:
            self._ranks.tell(CopyPages(tuple((c.source, c.destination) for c in copies)))
        super().copy_pages(copies)

    def launch(self, arrays: Mapping[str, Array]) -> Tensor:
        self._ranks.tell(Compute(arrays))
        with self._explaining_loss():
            return super().launch(arrays)

    def replay(self, shape: BatchShape, arrays: Mapping[str, Array]) -> Tensor:
        self._ranks.tell(Replay(shape, arrays))
        with self._explaining_loss():
            return super().replay(shape, arrays)

    def check(self) -> None:
        self._ranks.check()

    @contextmanager
    def _explaining_loss(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what a collective raises when the other side has gone
            raise self._ranks.error() from error

    @property
    def rank_pids(self) -> tuple[int, ...]:
        """Processes of ranks 1, 2, ..."""
        return self._ranks.pids

    def close(self) -> None:
        self._ranks.close()


def start_parallel(
    spec: RankSpec, devices: Sequence[str], queue: DeviceQueue, most_sequences: int = 0, rows_per_sequence: int = 0
) -> ParallelRunner:
    """Load a model on ``devices``, one rank on each. ``spec`` is rank 0's, without a port; so is ``queue``.
    ``most_sequences`` and ``rows_per_sequence`` as in ``GraphRunner``.

    Raises what loading raises; RankError if another rank could not load. Nothing is left running then.
    """
    store = host_store()
    specs = [replace(spec, rank=rank, store_port=store.port, device=device) for rank, device in enumerate(devices)]
    ranks = Ranks(specs[1:])
    try:
        group = join(specs[0], store)
        model, cache = load_rank(specs[0], group)
        ranks.await_loaded(group)
    except BaseException:
        ranks.close()
        raise
    return ParallelRunner(model, cache, spec.page_size, queue, spec.most_rows, ranks, most_sequences, rows_per_sequence)

"""A tensor-parallel model as the engine sees it: rank 0's part here, the other ranks' in processes of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from pearl.kv import PageCopy
from pearl.models import Decoder, ForwardBatch, KVCache
from pearl.parallel.messages import Compute, CopyPages, RankSpec
from pearl.parallel.rank_loader import host_store, join, load_rank
from pearl.parallel.ranks import Ranks
from pearl.workers.model_runner import ModelRunner
from pearl.workers.queue import DeviceQueue


class ParallelRunner(ModelRunner):
    """Every command goes to all ranks before this one's part is computed; the logits are whole on this one."""

    def __init__(self, model: Decoder, cache: KVCache, page_size: int, queue: DeviceQueue, ranks: Ranks) -> None:
        super().__init__(model, cache, page_size, queue)
        self._ranks = ranks

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        if copies:
            self._ranks.tell(CopyPages(tuple((c.source, c.destination) for c in copies)))
        super().copy_pages(copies)

    def compute(self, batch: ForwardBatch) -> Tensor:
        self._ranks.tell(Compute.of(batch))
        try:
            return super().compute(batch)
        except RuntimeError as error:  # what a collective raises when the other side has gone
            raise self._ranks.error() from error

    @property
    def rank_pids(self) -> tuple[int, ...]:
        """Processes of ranks 1, 2, ..."""
        return self._ranks.pids

    def close(self) -> None:
        self._ranks.close()


def start_parallel(spec: RankSpec, devices: Sequence[str], queue: DeviceQueue) -> ParallelRunner:
    """Load a model on ``devices``, one rank on each. ``spec`` is rank 0's, without a port; so is ``queue``.

    Raises what loading raises; RankError if another rank could not load. Nothing is left running then.
    """
    store = host_store()
    specs = [replace(spec, rank=rank, store_port=store.port, device=device) for rank, device in enumerate(devices)]
    ranks = Ranks(specs[1:])
    try:
        model, cache = load_rank(specs[0], join(specs[0], store))
        ranks.await_loaded()
    except BaseException:
        ranks.close()
        raise
    return ParallelRunner(model, cache, spec.page_size, queue, ranks)

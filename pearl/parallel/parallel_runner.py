"""A tensor-parallel model as the engine sees it: rank 0's part here, the other ranks' in processes of their own."""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import Tensor

from pearl.errors import RankError
from pearl.host_tensors import Array
from pearl.kv import PageCopy
from pearl.models import Decoder, KVCache
from pearl.parallel.messages import Compute, CopyPages, RankSpec, Replay
from pearl.parallel.rank_loader import host_store, join, load_rank
from pearl.parallel.ranks import Ranks
from pearl.workers.graph_runner import GraphRunner
from pearl.workers.graphs import Graphs
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
        hidden_layers: tuple[int, ...] = (),
    ) -> None:
        """``hidden_layers``: they are whole on each rank, so this one's are read, and the others keep none."""
        super().__init__(model, cache, page_size, queue, most_rows, most_sequences, rows_per_sequence, hidden_layers)
        self._ranks = ranks
        self._process = os.getpid()
        # Also where nobody closes it: the interpreter would destroy group and graphs in any order.
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def copy_pages(self, copies: Sequence[PageCopy]) -> None:
        with self._in_step():
            if copies:
                self._ranks.tell(CopyPages(tuple((c.source, c.destination) for c in copies)))
            super().copy_pages(copies)

    def launch(self, arrays: Mapping[str, Array]) -> Tensor:
        with self._in_step():
            self._ranks.tell(Compute(arrays))
            return super().launch(arrays)

    def replay(self, shape: BatchShape, arrays: Mapping[str, Array]) -> Tensor:
        with self._in_step():
            self._ranks.tell(Replay(shape, arrays))
            return super().replay(shape, arrays)

    def check(self) -> None:
        self._ranks.check()

    @contextmanager
    def _in_step(self) -> Iterator[None]:
        """What fails here, or is interrupted, leaves the others in a collective, or a step ahead: the group ends."""
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            self._drop_graphs()  # the group cannot end while they live
            reason = self._ranks.give_up(error)
            if not isinstance(error, Exception):
                raise
            raise reason from error

    def _drop_graphs(self) -> None:
        """NCCL ends a communicator only when no graph that was captured with it is left."""
        self._graphs = Graphs(self.queue, 1)

    @property
    def rank_pids(self) -> tuple[int, ...]:
        """Processes of ranks 1, 2, ..."""
        return self._ranks.pids

    def close(self) -> None:
        """End the group. Idempotent; in a fork of the engine's process nothing is ended."""
        if os.getpid() == self._process:
            atexit.unregister(self._at_exit)
            self._drop_graphs()
            self._ranks.close()


def _close(runner: weakref.ref[ParallelRunner]) -> None:
    if (alive := runner()) is not None:
        alive.close()


def start_parallel(
    spec: RankSpec,
    devices: Sequence[str],
    queue: DeviceQueue,
    most_sequences: int = 0,
    rows_per_sequence: int = 0,
    hidden_layers: tuple[int, ...] = (),
) -> ParallelRunner:
    """Load a model on ``devices``, one rank on each. ``spec`` is rank 0's, without a port; so is ``queue``.
    ``most_sequences``, ``rows_per_sequence`` and ``hidden_layers`` as in ``GraphRunner``.

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
    return ParallelRunner(
        model, cache, spec.page_size, queue, spec.most_rows, ranks, most_sequences, rows_per_sequence, hidden_layers
    )

"""A tensor-parallel target whose forwards are captured: every rank captures and repeats the same ones.

The ranks are threads here, each with a recording device; rank 0 tells the others what to do as it tells processes.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import load
from recording_queue import RecordingQueue
from test_parallel_target import CPU, PAGE, PAGES, save, spec, work

from pearl.errors import RankError
from pearl.models import Decoder, KVCache
from pearl.parallel import ParallelRunner
from pearl.parallel.messages import Compute, Replay
from pearl.parallel.rank_loader import host_store, join, load_rank, open_store
from pearl.parallel.rank_process import obey
from pearl.parallel.ranks import Ranks
from pearl.workers import GraphRunner, HostQueue, ModelRunner

# A prompt, then windows and single tokens of two sequences: shapes come back with other tokens, places and lengths.
BATCHES = [
    [work(0, 0, 9, 0, (5, 2, 9)), work(1, 0, 4, 1, (7, 3))],
    [work(0, 9, 2, 2, (5, 2, 9)), work(1, 4, 3, 3, (7, 3))],
    [work(0, 10, 1, 1, (5, 2, 9)), work(1, 5, 1, 1, (7, 3))],
    [work(1, 4, 3, 3, (7, 3)), work(0, 9, 2, 2, (5, 2, 9))],
    [work(1, 6, 1, 1, (7, 3)), work(0, 11, 1, 1, (5, 2, 9))],
]


@dataclass
class Told:
    """In place of the processes: what each further rank is told."""

    mailboxes: list[queue.Queue[Any]]
    lost: str | None = None

    def tell(self, command: Any) -> None:
        for mailbox in self.mailboxes:
            mailbox.put(command)

    def check(self) -> None:
        if self.lost:
            raise self.error()

    def error(self) -> RankError:
        return RankError(self.lost or "nobody knows")

    def give_up(self, error: BaseException) -> RankError:
        self.lost = f"rank 0 failed: {error}"
        return self.error()

    def close(self) -> None:
        self.lost = "closed"


def captured(model: Decoder, device: RecordingQueue) -> Decoder:
    collective: Any = model.collective
    exchanged: Any = SimpleNamespace(
        add_up=device.operator(collective.add_up), gather_logits=device.operator(collective.gather_logits)
    )
    return Decoder(model.config, model.weights, model.cos_sin, device.kernels(model.kernels), exchanged)


@contextmanager
def obeying(path: str, ranks: int, told: Told, port: int) -> Iterator[list[Future[RecordingQueue]]]:
    """Ranks 1, 2, ... as their processes run them, until None comes."""

    def run(rank: int) -> RecordingQueue:
        mine, device = replace(spec(path, ranks), rank=rank, store_port=port), RecordingQueue(late=False)
        model, cache = load_rank(mine, join(mine, open_store(port)))
        runner = GraphRunner(captured(model, device), cache, PAGE, device, most_rows=8)
        with torch.inference_mode(), device.enter("serve"):
            while (command := told.mailboxes[rank - 1].get(timeout=60)) is not None:
                obey(command, runner, CPU)
        return device

    with ThreadPoolExecutor(ranks) as pool:
        yield [pool.submit(run, rank) for rank in range(1, ranks)]


@pytest.mark.parametrize(("family", "ranks"), [("llama", 2), ("llama-one-kv-head", 3)])
def test_captured_forwards_of_all_ranks_are_those_of_the_whole_model(family: str, ranks: int, tmp_path: Path) -> None:
    path, store = save(family, tmp_path), host_store()
    told, device = Told([queue.Queue() for _ in range(ranks - 1)]), RecordingQueue(late=False)
    whole = load(tmp_path)
    alone = ModelRunner(whole, KVCache.allocate(whole.config, PAGES, PAGE, torch.float32, CPU), PAGE, HostQueue(CPU))
    seen: list[Any] = []
    with obeying(path, ranks, told, store.port) as others:
        mine = replace(spec(path, ranks), store_port=store.port)
        model, cache = load_rank(mine, join(mine, store))
        runner = ParallelRunner(captured(model, device), cache, PAGE, device, 8, told)  # type: ignore[arg-type]
        tell, told.tell = told.tell, lambda command: (seen.append(type(command)), tell(command))[1]  # type: ignore[method-assign]
        try:
            for batch in BATCHES:
                with torch.inference_mode(), device.enter("forward"):
                    found = runner.forward(batch).clone()
                with torch.inference_mode():
                    torch.testing.assert_close(found, alone.forward(batch), rtol=1e-4, atol=1e-4)
        finally:
            tell(None)
        devices = [other.result(60) for other in others]
    assert seen == [Compute, Replay, Replay, Replay, Replay]
    assert [(d.captured, d.replayed) for d in (device, *devices)] == [(2, 4)] * ranks


class ComputeGroup:
    """``abort`` is what a process group does for kernels that wait for a rank that is gone."""

    def __init__(self, backend: str) -> None:
        self.backend, self.aborted = backend, 0

    def name(self) -> str:
        return self.backend

    def abort(self) -> None:
        self.aborted += 1


@pytest.mark.parametrize(("backend", "aborted"), [("nccl", 1), ("gloo", 0)])
def test_when_a_rank_is_lost_nccl_is_told_to_give_up(backend: str, aborted: int, tmp_path: Path) -> None:
    ranks = Ranks([replace(spec(str(tmp_path), 2), rank=1, device="nowhere")])
    group = ComputeGroup(backend)
    with pytest.raises(RankError, match="rank 1 of 2 failed: "):
        ranks.await_loaded(group)  # type: ignore[arg-type]
    assert group.aborted == aborted
    ranks.close()
    assert group.aborted == 2 * aborted


@pytest.fixture
def alone(tmp_path: Path) -> ParallelRunner:
    """Rank 0 of one, on a recording device, after forwards that were captured."""
    path, store, device = save("llama", tmp_path), host_store(), RecordingQueue()
    mine = replace(spec(path, 1), store_port=store.port)
    model, cache = load_rank(mine, join(mine, store))
    runner = ParallelRunner(captured(model, device), cache, PAGE, device, 8, Told([]))  # type: ignore[arg-type]
    with torch.inference_mode(), device.enter("forward"):
        for batch in BATCHES[:3]:
            runner.forward(batch)
    assert len(runner._graphs) == 2
    return runner


@pytest.mark.parametrize("how", ["close", "exit", "failure"])
def test_graphs_go_before_the_group_that_they_were_captured_with(
    alone: ParallelRunner, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL waits, for ever, until the last of them is gone."""
    ended: list[str] = []
    graphs = [weakref.ref(graph) for graph in alone._graphs._graphs.values()]

    def end(self: Told, *args: object) -> RankError:
        assert [graph() for graph in graphs] == [None, None]
        ended.append(how)
        return RankError("rank 0 failed")

    monkeypatch.setattr(Told, "close", end)
    monkeypatch.setattr(Told, "give_up", end)
    if how == "close":
        alone.close()
    elif how == "exit":
        alone._at_exit()  # what the interpreter calls
    else:
        monkeypatch.setattr(alone.model, "forward", lambda *args: 1 / 0)
        with pytest.raises(RankError), torch.inference_mode():
            alone.launch({})
    assert ended == [how]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_forward_ends_the_group_and_stays_an_interruption(
    alone: ParallelRunner, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would be a forward ahead from then on, and every sum one of two different forwards."""

    def interrupt(*args: object) -> Any:
        raise error

    monkeypatch.setattr(alone.model, "forward", interrupt)
    with pytest.raises(error), torch.inference_mode():
        alone.forward(BATCHES[0])
    with pytest.raises(RankError, match="rank 0 failed"):
        alone.check()


def test_what_was_computed_while_a_rank_was_lost_is_not_believed(tmp_path: Path) -> None:
    """On a GPU a broken collective does not raise: the forward just ends."""
    path, store = save("llama", tmp_path), host_store()
    mine = replace(spec(path, 1), store_port=store.port)
    model, cache = load_rank(mine, join(mine, store))
    told = Told([])
    runner = ParallelRunner(model, cache, PAGE, HostQueue(CPU), 0, told)  # type: ignore[arg-type]
    with torch.inference_mode():
        runner.forward(BATCHES[0])
    runner.check()
    told.lost = "rank 1 of 2 ended with status -9"
    with pytest.raises(RankError, match="status -9"):
        runner.check()

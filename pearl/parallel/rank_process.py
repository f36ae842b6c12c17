"""The process of one rank: ``python -m pearl.parallel.rank_process FD``, FD being its end of the pipe to the engine.

It ends when the pipe does: a rank never outlives the engine's process, however that ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
import traceback
from multiprocessing.connection import Connection

import torch

from pearl.parallel.messages import Command, Compute, CopyPages, Failed, Loaded, RankSpec, Replay
from pearl.parallel.rank_loader import join, load_rank, open_store
from pearl.workers.graph_runner import GraphRunner
from pearl.workers.queue import open_queue

_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    _die_with_parent()
    pipe: Connection[object, object] = Connection(descriptor)
    try:
        spec = pipe.recv()
        assert isinstance(spec, RankSpec)
        serve(spec, pipe)
    except EOFError:
        return 0
    except Exception:
        with contextlib.suppress(OSError):
            pipe.send(Failed(traceback.format_exc()))
        return 1
    return 0


def serve(spec: RankSpec, pipe: Connection[object, object]) -> None:
    """Load, then obey until the pipe ends (EOFError)."""
    torch.set_num_threads(spec.threads)
    device = torch.device(spec.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton and NCCL work on the current one
    group = join(spec, open_store(spec.store_port))
    model, cache = load_rank(spec, group)
    queue = open_queue(f"rank {spec.rank}", device)
    runner = GraphRunner(model, cache, spec.page_size, queue, spec.most_rows)
    pipe.send(Loaded())
    with torch.inference_mode(), queue.enter("serve"):
        while True:
            obey(pipe.recv(), runner, device)


def obey(command: object, runner: GraphRunner, device: torch.device) -> None:
    assert isinstance(command, Command)
    match command:
        case Compute(arrays):
            runner.launch(arrays)
        case Replay(shape, arrays):
            runner.replay(shape, arrays)
        case CopyPages(pairs):
            runner.copy_pairs(torch.tensor(pairs, device=device))


def _die_with_parent() -> None:
    """A collective that waits for a dead engine would not see the pipe end. Linux only; elsewhere gloo's sockets do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))

"""The process of one rank: ``python -m pearl.parallel.rank_process FD PID``.

FD is its end of the pipe to the engine's process, PID that process. It ends when either does: a rank never outlives the
engine, however that ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection

import torch

from pearl.host_tensors import from_numbers
from pearl.parallel.messages import Command, Compute, CopyPages, Failed, Loaded, RankSpec, Replay
from pearl.parallel.rank_loader import join, load_rank, open_store
from pearl.workers.graph_runner import GraphRunner
from pearl.workers.queue import open_queue


def main(descriptor: int, engine: int) -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the engine's to handle
    threading.Thread(target=end_with, args=(descriptor, engine), name="pearl-engine-watch", daemon=True).start()
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
            runner.copy_pairs(from_numbers(pairs, torch.int64, device))


def end_with(descriptor: int, engine: int) -> None:
    """Wait until the pipe or the engine's process ends, then end this one, wherever it is: a rank that waits in a
    collective does not read its pipe.

    Not by a signal at the parent's death (PR_SET_PDEATHSIG): Linux means the thread that started this process, which
    may end long before its process. The pipe alone is not enough: a fork of the engine's process holds it too.
    """
    ends = select.poll()
    ends.register(descriptor, 0)  # a hang-up is told without being asked for
    with contextlib.suppress(OSError, AttributeError):  # where there are no pidfds, or the process has ended already
        ends.register(os.pidfd_open(engine), select.POLLIN)
    if os.getppid() == engine:
        ends.poll()
    os._exit(0)


if __name__ == "__main__":
    status = main(int(sys.argv[1]), int(sys.argv[2]))
    # Not in an orderly way: group and graphs would be destroyed in any order, and NCCL's end waits for its graphs'.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

"""The processes of ranks 1, 2, ... of a tensor-parallel model: started, told, watched and ended together."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

import torch

from pearl.errors import RankError
from pearl.models.collective import Group
from pearl.parallel.messages import Command, Failed, Loaded, RankSpec

_ENDING_SECONDS = 5.0
_LAST_WORDS_SECONDS = 2.0
_NOTICE_SECONDS = 1.0  # after which a collective that failed did not fail because a rank ended
_GRACE_SECONDS = 0.3  # in which the end of one rank shows that another's words were about losing it


class Ranks:
    """Owns the other ranks' processes. The model's worker tells them what to do; a thread of its own watches them.

    When one ends before ``close``, or rank 0 gives up, all are ended, and from then on every call raises RankError with
    the reason.
    """

    def __init__(self, specs: Sequence[RankSpec]) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._failure: str | None = None
        self._noticed = threading.Event()  # that a rank has ended; the reason follows
        self._failed = threading.Event()
        self._group: Group | None = None
        self._closed = False
        self._pipes: list[Connection[object, object]] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        for spec in specs:
            ours, process = _start()
            pipe: Connection[object, object] = Connection(os.dup(ours.fileno()))
            self._sockets.append(ours)
            self._pipes.append(pipe)
            self._processes.append(process)
            pipe.send(spec)
        self._names = [f"rank {spec.rank} of {spec.ranks}" for spec in specs]

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(process.pid for process in self._processes)

    def await_loaded(self, group: Group) -> None:
        """Wait until every rank has its weights. RankError with the rank's own words if one could not load.

        ``group``: of this process, to be given up when a rank is lost.
        """
        self._group = group
        for index, pipe in enumerate(self._pipes):
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = None
            if not isinstance(message, Loaded):
                self._fail(self._reason(index, message))
                raise self.error()
        threading.Thread(target=self._watch, name="pearl-rank-watch", daemon=True).start()

    def tell(self, command: Command) -> None:
        self.check()
        for pipe in self._pipes:
            try:
                pipe.send(command)
            except OSError:
                raise self.error() from None

    def check(self) -> None:
        """RankError if a rank was lost: what was computed since then is worth nothing."""
        if self._failure is not None:
            raise self.error()

    def error(self) -> RankError:
        """Why the group cannot go on. Asked after a collective failed, it waits a little for the watcher to know."""
        self._failed.wait(2 * _LAST_WORDS_SECONDS + _GRACE_SECONDS)
        return RankError(self._failure or "the ranks of the target lost each other")

    def give_up(self, error: BaseException) -> RankError:
        """End the group: rank 0 failed after the others were told, and they wait for it. Returns what to say of it.

        No graph that was captured with the group may be left.
        """
        # A collective raises a RuntimeError when a rank at its other end has gone, which is then seen as well.
        own = not isinstance(error, RuntimeError) or isinstance(error, torch.OutOfMemoryError)
        if own or not self._noticed.wait(_NOTICE_SECONDS):
            ranks = len(self._processes) + 1
            self._fail(f"rank 0 of {ranks} failed: {type(error).__name__}: {error}")
        return self.error()

    def close(self) -> None:
        """End all ranks and wait for them. Idempotent; in a fork of the engine's process nothing is ended.

        No graph that was captured with the group may be left.
        """
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
        self._abort()
        self._end(gently=True)

    def _watch(self) -> None:
        """Pipes carry nothing to this side after loading but a rank's last words, or their end."""
        wait(self._pipes)
        self._noticed.set()
        time.sleep(_GRACE_SECONDS)
        ended = [index for index, pipe in enumerate(self._pipes) if wait([pipe], 0)]
        with self._lock:
            if self._closed:
                return
        # A rank that loses another says so; the one that was lost, killed, says nothing.
        words = {index: self._last_words(index) for index in ended}
        index = min(ended, key=lambda i: isinstance(words[i], Failed))
        self._fail(self._reason(index, words[index]))

    def _last_words(self, index: int) -> object:
        try:
            return self._pipes[index].recv() if self._pipes[index].poll(_LAST_WORDS_SECONDS) else None
        except (EOFError, OSError):
            return None

    def _reason(self, index: int, message: object) -> str:
        if isinstance(message, Failed):
            words = message.trace.strip()
            return f"{self._names[index]} failed: {words.splitlines()[-1]}\n{words}"
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._processes[index].wait(_LAST_WORDS_SECONDS)
        return f"{self._names[index]} ended with status {self._processes[index].returncode}"

    def _fail(self, reason: str) -> None:
        with self._lock:
            if self._failure is not None or self._closed:
                return
            self._failure = reason
            self._failed.set()
        self._end(gently=False)
        self._abort()  # last: it waits for graphs that this process has captured

    def _abort(self) -> None:
        """NCCL's kernels would wait for a lost rank for ever; gloo has noticed, and has nothing to give up."""
        if self._group is not None and self._group.name() == "nccl":
            self._group.abort()

    def _end(self, gently: bool) -> None:
        if not gently:
            for process in self._processes:
                process.kill()
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # a close alone would wait for the watcher to leave the pipe
        for process in self._processes:
            try:
                process.wait(_ENDING_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _start() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Our end of the pipe, and the process. Not multiprocessing's spawn: that imports the user's script again."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "pearl.parallel.rank_process", str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
    return ours, process

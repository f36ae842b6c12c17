"""Runs one command under a limit and leaves nothing of it behind. Standard library only, as all of the GPU suite."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL = 0.05  # seconds
_GRACE = 10.0  # seconds, at most, in which an interrupted command writes what it has
_GRACE_AFTER_SIGNAL = 3.0
_DYING = 5.0  # seconds, at most, that a killed command is waited for: one that hangs in a driver may never end


@dataclass(frozen=True)
class Ended:
    """``code`` is the exit status, negative for a signal; ``cut_off`` says why it did not end by itself."""

    argv: tuple[str, ...]
    code: int
    seconds: float
    cut_off: str = ""

    @property
    def ok(self) -> bool:
        return self.code == 0 and not self.cut_off


def run_limited(
    argv: Sequence[str],
    log: Path,
    limit: float,
    *,
    cwd: Path,
    environment: Mapping[str, str],
    stopped: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run ``argv`` in a process group of its own, its output added to ``log``.

    ``limit`` is of seconds, the grace included: before it ends, or as soon as ``stopped()``, the group is interrupted
    as by Ctrl-C, so that programs write what they have, and then killed. Whatever the command itself left running is
    killed too. One that does not even end then is left behind.
    """
    begin = time.monotonic()
    with log.open("a") as output:
        output.write(f"$ {shlex.join(argv)}\n")
        output.flush()
        try:
            process = subprocess.Popen(
                list(argv), cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            output.write(f"{error}\n")
            return Ended(tuple(argv), 127, time.monotonic() - begin)
        try:
            cut_off = _wait(process, begin, limit, stopped)
        finally:
            _signal_group(process.pid, signal.SIGKILL)
            _wait_for_end(process, _DYING)
    code = -signal.SIGKILL if process.returncode is None else process.returncode
    return Ended(tuple(argv), code, time.monotonic() - begin, cut_off)


def _wait(process: subprocess.Popen[bytes], begin: float, limit: float, stopped: Callable[[], bool]) -> str:
    """Until it ends or has had its grace; why it was interrupted."""
    grace = min(_GRACE, limit / 4)
    while process.poll() is None:
        if stopped():
            cut_off, grace = "an interruption", min(grace, _GRACE_AFTER_SIGNAL)
        elif time.monotonic() - begin >= limit - grace:
            cut_off = f"its limit of {limit:.0f} s"
        else:
            time.sleep(_POLL)
            continue
        _signal_group(process.pid, signal.SIGINT)
        _wait_for_end(process, grace)
        return cut_off
    return ""


def _wait_for_end(process: subprocess.Popen[bytes], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


def _signal_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:  # all of them have ended
        return

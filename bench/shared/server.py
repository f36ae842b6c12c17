"""``pearl serve`` as a process of its own, on a free port of loopback."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

from pearl.errors import RoundError

_ROOT = Path(__file__).resolve().parents[2]
_LOADING = 300.0  # seconds until a server must listen
_ENDING = 60.0  # seconds that it has to finish what runs
_LINES = 20_000  # of its log that are kept
PEARL = "pearl.cli"
_MEBIBYTE = 1 << 20


class Server:
    """``log``: its latest lines, of standard error."""

    def __init__(self, process: subprocess.Popen[str], host: str, port: int, log: deque[str]) -> None:
        self.process, self.host, self.port, self.log = process, host, port, log

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def resident(self) -> float:
        """MiB of its memory, those of processes that it started included; 0 where there is no /proc."""
        return sum(map(_resident, _family(self.process.pid))) / _MEBIBYTE


@contextlib.contextmanager
def server(arguments: Sequence[str], module: str = PEARL) -> Iterator[Server]:
    """``pearl serve`` with these arguments, by the module that has the command line. It is drained at the end.

    Raises RoundError, with what it wrote, if it ends before it listens.
    """
    line = [sys.executable, "-m", module, "serve", "--port", "0", "--host", "127.0.0.1", *arguments]
    names = os.environ | {"PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    process = subprocess.Popen(
        line, env=names, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    patience = threading.Timer(_LOADING, process.kill)
    patience.daemon = True
    patience.start()
    log: deque[str] = deque(maxlen=_LINES)
    reader = None
    try:
        assert process.stderr is not None
        for words in process.stderr:
            log.append(words)
            if found := re.search(r"listening on http://([\d.]+):(\d+),", words):
                break
        else:
            raise RoundError(f"the server did not start: {' '.join(line)}\n{''.join(log)}")
        patience.cancel()
        reader = threading.Thread(target=log.extend, args=(process.stderr,), daemon=True)  # or the pipe would fill
        reader.start()
        yield Server(process, found[1], int(found[2]), log)
    finally:
        patience.cancel()
        _end(process)
        if reader is not None:
            reader.join(_ENDING)


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(_ENDING)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _family(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [pid, *(each for child in children for each in _family(int(child)))]
    return [pid]


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0

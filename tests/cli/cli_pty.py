"""A command with a terminal of its own: what a person sees and types."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import pearl

ROOT = Path(pearl.__file__).parents[1]
TIMEOUT = 60.0  # of every wait; a healthy run needs a tenth of it on a busy machine


class PtyProcess:
    """``python -m pearl.cli ARGUMENTS`` on a pseudo terminal, killed at the end of the block."""

    def __init__(self, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        self._master, slave = pty.openpty()
        inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
        settings = {"TERM": "xterm-256color", "COLUMNS": "200", "PYTHONPATH": str(ROOT), **(environment or {})}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pearl.cli", *arguments],
            stdin=slave, stdout=slave, stderr=slave, env=inherited | settings, start_new_session=True,
            preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)
        self.output = ""
        self._seen = 0

    def __enter__(self) -> PtyProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def wait_for(self, text: str) -> str:
        """Everything from the last wait up to and with ``text``."""
        deadline = time.monotonic() + TIMEOUT
        while (at := self.output.find(text, self._seen)) < 0:
            assert self._receive(deadline), f"no {text!r} before the end of {self.output[self._seen :]!r}"
        begin, self._seen = self._seen, at + len(text)
        return self.output[begin : self._seen]

    def type(self, keys: str) -> None:
        """As if typed: "\\x03" is Ctrl-C, "\\x04" is Ctrl-D."""
        os.write(self._master, keys.encode())

    def wait(self) -> int:
        """Read to the end; the exit code."""
        deadline = time.monotonic() + TIMEOUT
        while self._receive(deadline):
            pass
        return self._process.wait(TIMEOUT)

    def _receive(self, deadline: float) -> bool:
        """Read what there is, waiting for it; False at the end of output."""
        ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing came for {TIMEOUT} s after {self.output[self._seen :]!r}"
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux: the other side is closed
            return False
        self.output += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)


def _take_terminal() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C becomes SIGINT."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)

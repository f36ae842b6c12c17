"""``pearl serve`` in a process of its own, as users start it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from pearl.errors import PearlError
from pearl.models import bundled_path

_ENDING_SECONDS = 30
_SAYS = "listening on "  # and then the URL


class Served(NamedTuple):
    url: str
    model: str
    weights: Path  # of the target, with its tokenizer


@contextmanager
def live_server(log: Path) -> Iterator[Served]:
    """The bundled pair in fp32, which a client may compare to the last digits. What it says goes to ``log``."""
    line = [
        sys.executable,
        "-c",
        "from pearl.cli.app import main; main()",
        "serve",
        "--port",
        "0",
        "--dtype",
        "float32",
    ]
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    try:
        yield Served(_url(process, log), "pearl-bundled", bundled_path("target"))
    finally:
        process.terminate()
        try:
            process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    while process.poll() is None:
        for line in log.read_text("utf-8").splitlines():
            if line.startswith(_SAYS) and "," in line:
                return line.removeprefix(_SAYS).split(",")[0]
        time.sleep(0.1)
    raise PearlError(f"pearl serve ended before it listened:\n{log.read_text('utf-8')}")

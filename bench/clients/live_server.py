"""The server that other people's clients are tried on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.shared.server import server
from pearl.models import bundled_path


class Served(NamedTuple):
    """``log``: what the server wrote, its latest lines."""

    url: str
    model: str
    weights: Path  # of the target, with its tokenizer
    log: Sequence[str]


@contextmanager
def live_server() -> Iterator[Served]:
    """The bundled pair in fp32, which a client may compare to the last digits."""
    with server(["--dtype", "float32"]) as running:
        yield Served(running.url, "pearl-bundled", bundled_path("target"), running.log)

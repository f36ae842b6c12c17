"""What fits into memory: a benchmark's cell that does not is left out, with a reason, and ends nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench.round_latency.cell import RoundFailed
from pearl.engine.memory import gib
from pearl.errors import ConfigurationError

_SIGNS = ("out of memory", "OutOfMemoryError", "not enough memory", "can't allocate memory")


class DoesNotFit(Exception):
    """The message is the reason."""


@contextmanager
def explaining_what_does_not_fit() -> Iterator[None]:
    """DoesNotFit in place of every error by which torch, the engine or a failed round says that memory is short."""
    try:
        yield
    except (ConfigurationError, MemoryError, torch.OutOfMemoryError) as error:
        raise DoesNotFit(_reason(error)) from error
    except (RoundFailed, RuntimeError) as error:  # the CPU's allocator has no error class of its own
        if not any(sign in str(error) for sign in _SIGNS):
            raise
        raise DoesNotFit(_reason(error)) from error


def _reason(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


def require_host_room(what: str, needed: int) -> None:
    """DoesNotFit unless as many bytes are free: an operating system ends programs that take more, without a word."""
    free = free_host_bytes()
    if needed > free:
        raise DoesNotFit(f"{what} need {gib(needed)}, {gib(free)} are free")


def free_host_bytes() -> int:
    """What new programs may take without swapping."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

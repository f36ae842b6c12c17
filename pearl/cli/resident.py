"""How much memory this process holds."""

from __future__ import annotations

import os
from pathlib import Path


def resident() -> str | None:
    """For example "623 MB resident"; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e6:.0f} MB resident"

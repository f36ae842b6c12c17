"""Small random models of tests/models."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("models", "e2e"):  # families, recording_queue
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

"""Forwards and rounds of real model shapes, with random weights: `python bench/latency.py --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, whose bench/ is not installed

from bench.round_latency.program import main

if __name__ == "__main__":
    main()

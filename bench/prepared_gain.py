"""Prepared windows, predicted and measured, and where the time goes: `python bench/prepared_gain.py --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, whose bench/ is not installed

from bench.simulation.program import main

if __name__ == "__main__":
    main()

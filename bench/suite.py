"""The paper's experiments and their report, a command each: `python bench/suite.py --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, whose bench/ is not installed

from bench.evaluation.program import main

if __name__ == "__main__":
    main()

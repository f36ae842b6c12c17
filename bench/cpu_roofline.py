"""CPU kernels against the memory's speed, and beside other engines: `python bench/cpu_roofline.py --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, whose bench/ is not installed

from bench.roofline.program import main

if __name__ == "__main__":
    main()

"""What a round costs the host, beside forwards and kernels: `python bench/host_cost.py --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, whose bench/ is not installed

from bench.round_cost.program import main

if __name__ == "__main__":
    main()

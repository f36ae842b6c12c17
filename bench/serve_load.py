"""A server under load: requests, tokens and waiting per second: `python bench/serve_load.py --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, whose bench/ is not installed

from bench.serving_load.program import main

if __name__ == "__main__":
    main()

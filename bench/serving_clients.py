"""Other people's clients against a live server: `python bench/serving_clients.py --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, whose bench/ is not installed

from bench.clients.program import main

if __name__ == "__main__":
    main()

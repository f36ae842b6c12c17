"""Many clients, some of which leave: what is lost, wrong or leaked: `python bench/serve_soak.py --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, whose bench/ is not installed

from bench.serving_load.soak import main

if __name__ == "__main__":
    main()

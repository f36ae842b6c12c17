"""Plain decoding beside llama.cpp, whole processes in turns: `python bench/cpu_decoding.py --help`."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the checkout, whose bench/ is not installed

from bench.roofline.decoding import main

if __name__ == "__main__":
    main()

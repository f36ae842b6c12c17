"""Decoding methods side by side on real prompts: `python bench/throughput.py --help`."""

from pearl.bench.throughput import main

if __name__ == "__main__":
    main()

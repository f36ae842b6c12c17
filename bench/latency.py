"""Forwards and rounds of real model shapes, with random weights: `python bench/latency.py --help`."""

from pearl.bench.latency import main

if __name__ == "__main__":
    main()

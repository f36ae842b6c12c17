"""CPU kernels against the memory's speed, and beside other engines: `python bench/cpu_roofline.py --help`."""

from pearl.bench.roofline import main

if __name__ == "__main__":
    main()

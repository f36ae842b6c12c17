"""Benchmarks, run from a checkout: a program or a folder for each question; ``docs/architecture.md`` lists them.

They import pearl as it is installed, and pearl never imports them. What a user measures with (``pearl bench``) is in
``pearl/bench``.
"""

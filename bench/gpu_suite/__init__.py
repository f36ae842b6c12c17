"""``bash bench/gpu_suite.sh``: everything that a GPU has to show.

The suite itself imports the standard library only, neither pearl nor the rest of bench, so that it can tell what is
wrong where nothing else works.
"""

"""``bash bench/gpu_suite.sh``: everything that a GPU has to show.

Runs as ``bench.gpu_suite`` from inside ``pearl/`` (see the script), hence the relative imports: only the standard
library is needed, so that it can tell what is wrong where nothing else works.
"""

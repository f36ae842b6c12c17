"""The main job: how fast the methods are, side by side, on real prompts (``bench/throughput.py``, ``pearl bench``)."""

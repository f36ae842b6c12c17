"""GPU kernels on CPU tensors: Triton in its interpreter, CUDA C++ under a shim (tests/cuda_emu)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "ops"))  # ops_support

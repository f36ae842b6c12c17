"""How glibc hands out memory while a model is trained on a CPU."""

from __future__ import annotations

import os
import sys

import torch

# glibc's default returns every large activation to the kernel; page faults then cost 4/5 of a CPU training step.
CPU_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 30),
    "OMP_WAIT_POLICY": "passive",
}


def restart_for_training() -> None:
    """Without a GPU: begin this program anew with that environment, unless it has it. malloc reads it at the start."""
    if not torch.cuda.is_available() and any(os.environ.get(k) != v for k, v in CPU_ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | CPU_ENVIRONMENT)

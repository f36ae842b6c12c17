"""Kernels that Triton compiles are counted. Compiled for real, for a GPU that is not there; nothing is launched."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

_PROGRAM = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Driver:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(Driver())
from pearl_kernels.triton import activation
from pearl_kernels.triton.compiled import count_compiled

(kernel,) = (value for value in vars(activation).values() if isinstance(value, triton.JITFunction))
count = count_compiled()
numbers = [count()]
for dtype in (torch.float32, torch.float32, torch.bfloat16):
    kernel.warmup(dtype, dtype, 128, 64, 1, BLOCK=1024, GELU=False, num_warps=4, grid=(1,))
    numbers.append(count())
print(numbers)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_each_variant_counts_once() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM], capture_output=True, text=True, env=environment, timeout=200
    )
    assert done.stdout.split("\n")[0] == "[0, 1, 1, 2]", done.stderr

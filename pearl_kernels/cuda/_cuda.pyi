"""The compiled module (csrc/python/cuda_bindings.cpp).

Its operators are those of ``pearl_kernels/cpu/_core.pyi``, with ``where`` = (number of the device, handle of the
stream); those with a workspace take its address and bytes before that, and say how many as OP_workspace. Both modules
are called by ``pearl_kernels.native``. A kernel that cannot take its arguments raises ValueError, any other CUDA error
RuntimeError.
"""

from typing import Any

def verify_attention_shared(dtype: int, head_dim: int) -> int: ...  # bytes that a block takes at least
def driver_version() -> int: ...  # 1000 * major + 10 * minor; 0 without a driver
def runtime_version() -> int: ...  # of the toolkit that the module was built with
def __getattr__(operator: str) -> Any: ...

"""How many kernels Triton has compiled: a call that compiles one takes seconds longer than the next."""

from __future__ import annotations

import sys
from collections.abc import Callable

from triton.runtime.jit import JITFunction

from pearl_kernels.triton import MODULES


def count_compiled() -> Callable[[], int]:
    """What tells how many variants of the provider's kernels are there, compiled in this process or loaded from
    Triton's cache. Of the kernels whose modules have been imported by now.
    """
    package = MODULES["rms_norm"].rpartition(".")[0]
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(f"{package}.")]
    kernels = {id(value): value for module in modules for value in vars(module).values() if _is_kernel(value)}
    return lambda: sum(len(caches[0]) for kernel in kernels.values() for caches in kernel.device_caches.values())


def _is_kernel(value: object) -> bool:
    return isinstance(value, JITFunction)  # Triton's interpreter has others, and compiles nothing

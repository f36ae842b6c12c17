"""The CUDA C++ provider: fp32, bf16 and fp16 on NVIDIA GPUs of compute capability 8.0 and newer (csrc/cuda).

The kernels need neither torch's headers nor a CUDA toolkit at run time, only a driver as new as the toolkit that they
were built with.
"""

from __future__ import annotations

import importlib

import torch

from pearl_kernels.checks import DTYPE_CODES
from pearl_kernels.lazy import LazyOperators
from pearl_kernels.provider import Situation

OPERATORS = LazyOperators(
    {
        "rms_norm": "pearl_kernels.cuda.operators",
        "add_rms_norm": "pearl_kernels.cuda.operators",
        "silu_and_mul": "pearl_kernels.cuda.operators",
        "gelu_and_mul": "pearl_kernels.cuda.operators",
        "scale_and_cap": "pearl_kernels.cuda.operators",
        "rope_and_cache": "pearl_kernels.cuda.operators",
        "verify_attention": "pearl_kernels.cuda.operators",
        "verify": "pearl_kernels.cuda.operators",
        "copy_blocks": "pearl_kernels.cuda.operators",
    }
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HEAD_DIM_MATTERS = ("rope_and_cache", "verify_attention")
_CAPABILITY = (8, 0)  # the oldest that there is code for


def refuses(op: str, situation: Situation) -> str | None:
    """None if ``op`` can run in ``situation``, else why not."""
    if situation.device != "cuda":
        return f"runs on cuda, not on {situation.device}"
    # copy_blocks moves bytes, of whatever type.
    if op != "copy_blocks" and situation.dtype not in DTYPES:
        return f"computes float32, bfloat16 and float16, not {situation.dtype}"
    if op == "verify" and situation.rule == "block":
        return "has no block verification"
    if op in _HEAD_DIM_MATTERS and (situation.head_dim % 8 or not 8 <= situation.head_dim <= 256):
        return f"needs a head_dim that is a multiple of 8 up to 256, not {situation.head_dim}"
    return _cannot_load() or _no_device() or _does_not_fit(op, situation)


def _cannot_load() -> str | None:
    """Why the compiled module cannot be used here, or None."""
    try:
        module = importlib.import_module("pearl_kernels.cuda._cuda")
    except ImportError as error:
        return f"the CUDA kernels are not built ({error}); with nvcc on PATH, PEARL_CUDA=1 pip install -e . builds them"
    driver, runtime = module.driver_version(), module.runtime_version()
    if driver == 0:
        return "there is no NVIDIA driver"
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver is for CUDA {_version(driver)}, older than CUDA {_version(runtime)}, which the kernels were "
            "built with: a newer driver, or a build with an older toolkit"
        )
    return None


def _no_device() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _CAPABILITY:
        return f"needs compute capability 8.0 or newer; this GPU has {capability[0]}.{capability[1]}"
    return None


def _does_not_fit(op: str, situation: Situation) -> str | None:
    """Cards of capability 8.6, 8.9 and 12 have 99 KiB of shared memory for a block, the others 163 or 227."""
    if op != "verify_attention":
        return None
    module = importlib.import_module("pearl_kernels.cuda._cuda")
    needed = module.verify_attention_shared(DTYPE_CODES[situation.dtype], situation.head_dim) >> 10
    # What a block may have is a KiB less than a multiprocessor has, on all of them.
    there = (torch.cuda.get_device_properties().shared_memory_per_multiprocessor >> 10) - 1
    if needed <= there:
        return None
    return (
        f"needs {needed} KiB of shared memory for a head_dim of {situation.head_dim} in {situation.dtype}; "
        f"a block has {there} KiB on this GPU"
    )


def _version(number: int) -> str:
    """12080 is 12.8."""
    return f"{number // 1000}.{number % 1000 // 10}"

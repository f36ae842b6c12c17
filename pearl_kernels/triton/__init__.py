"""The Triton provider: fp32, bf16 and fp16 on CUDA devices; on CPU tensors under Triton's interpreter, for tests.

Each module has the kernels of a group of operators, functions with the reference's signatures that launch them, and
``VARIANTS``, the specialisations that ``python -m pearl_kernels.report`` compiles ahead of time.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from pearl_kernels.checks import DTYPE_CODES, Checks
from pearl_kernels.lazy import LazyOperators
from pearl_kernels.provider import Situation

MODULES = {
    "rms_norm": "pearl_kernels.triton.norm",
    "add_rms_norm": "pearl_kernels.triton.norm",
    "silu_and_mul": "pearl_kernels.triton.activation",
    "gelu_and_mul": "pearl_kernels.triton.activation",
    "scale_and_cap": "pearl_kernels.triton.scaling",
    "route": "pearl_kernels.triton.routing",
    "experts": "pearl_kernels.triton.experts",
    "pack_linear": "pearl_kernels.triton.linear",
    "pack_quantized": "pearl_kernels.triton.linear",
    "weight_rows": "pearl_kernels.triton.linear",
    "linear": "pearl_kernels.triton.linear",
    "rope_and_cache": "pearl_kernels.triton.rope",
    "verify_attention": "pearl_kernels.triton.attention",
    "sample": "pearl_kernels.triton.sampling",
    "verify": "pearl_kernels.triton.verification",
}
OPERATORS = LazyOperators(MODULES)

_HEAD_DIM_MATTERS = ("rope_and_cache", "verify_attention")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _current_device() -> int:
    """Triton launches there, wherever its tensors are."""
    return torch.cuda.current_device()


_DTYPES = tuple(DTYPE_CODES)
CHECKS = Checks("cpu", _DTYPES) if interpreting() else Checks("cuda", _DTYPES, current=_current_device)


def refuses(op: str, situation: Situation) -> str | None:
    """None if ``op`` can run in ``situation``, else why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if situation.device != CHECKS.device:
        return f"runs on {'cpu, in the interpreter' if interpreting() else 'cuda'}, not on {situation.device}"
    if situation.dtype not in CHECKS.dtypes:
        return f"computes float32, bfloat16 and float16, not {situation.dtype}"
    if op == "experts" and situation.weights != "full":
        return f"multiplies weights as they are stored, not {situation.weights}"
    if op in _HEAD_DIM_MATTERS and (situation.head_dim % 8 or not 8 <= situation.head_dim <= 256):
        return f"needs a head_dim that is a multiple of 8 up to 256, not {situation.head_dim}"
    return None

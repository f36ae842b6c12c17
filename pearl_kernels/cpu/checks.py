"""What a tensor must be before its address goes to C++: on CPU, of the right dtype, shape and layout.

These run on every call of operators that take microseconds: a handful of attribute reads, words only on failure.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}  # csrc/include/pearl/params.h


def floating(op: str, name: str, tensor: Tensor) -> int:
    """The dtype's code; ValueError unless the tensor is fp32 or bf16."""
    code = DTYPE_CODES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"{op}: {name} must be float32 or bfloat16, not {tensor.dtype}")
    return code


def contiguous(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The address of a contiguous tensor of this dtype and shape; else ValueError."""
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_cpu or not tensor.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous {dtype} {list(shape)} on cpu, not {_describe(tensor)}")
    return tensor.data_ptr()


def rows(op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, int]:
    """Address and row stride of a tensor whose rows are contiguous, but may lie apart; else ValueError."""
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_cpu:
        raise ValueError(f"{op}: {name} must be {dtype} {list(shape)} on cpu, not {_describe(tensor)}")
    if not tensor.is_contiguous():
        expected = 1
        for size, stride in zip(reversed(shape[1:]), reversed(tensor.stride()[1:]), strict=True):
            if size != 1 and stride != expected:
                raise ValueError(f"{op}: each row of {name} must be contiguous, not {_describe(tensor)}")
            expected *= size
    return tensor.data_ptr(), tensor.stride(0)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"

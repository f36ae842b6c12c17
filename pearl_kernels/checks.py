"""What tensors must be before a kernel gets their addresses: device, dtype, shape and layout.

These run on every call of operators that take microseconds: a handful of attribute reads, words only on failure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/include/pearl/params.h


@dataclass(frozen=True)
class Checks:
    """The limits of one provider: tensors on ``device`` (torch's device type), floating ones of ``dtypes``.

    ``current``: the index of the device that the provider launches on, whatever its tensors'; None: on theirs.
    """

    device: str
    dtypes: Sequence[torch.dtype]
    max_head_dim: int = 256
    current: Callable[[], int] | None = None
    _calls: dict[torch.device, CallChecks] = field(default_factory=dict, init=False, compare=False, repr=False)

    def beside(self, op: str, name: str, tensor: Tensor) -> CallChecks:
        """The checks of one call, all of whose tensors must be on this one's device; else ValueError."""
        device = tensor.device
        checks = self._calls.get(device)
        if checks is None:
            if device.type != self.device:
                wanted = f"{tensor.dtype} {list(tensor.shape)} on {self.device}"
                raise ValueError(f"{op}: {name} must be {wanted}, not {_describe(tensor)}")
            checks = self._calls[device] = CallChecks(device, self.dtypes, self.max_head_dim)
        if self.current is not None and device.index != self.current():
            raise ValueError(f"{op}: {name} is on {device}, which is not the current device: it must be")
        return checks


@dataclass(frozen=True)
class CallChecks:
    """As ``Checks``, on one device: two tensors on two GPUs do not fit together."""

    device: torch.device
    dtypes: Sequence[torch.dtype]
    max_head_dim: int

    def floating(self, op: str, name: str, tensor: Tensor) -> int:
        """The dtype's code; ValueError unless the provider computes it."""
        if tensor.dtype not in self.dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            raise ValueError(f"{op}: {name} must be {names}, not {tensor.dtype}")
        return DTYPE_CODES[tensor.dtype]

    def contiguous(self, op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        """The address of a contiguous tensor of this dtype and shape; else ValueError."""
        if (
            tensor.dtype is not dtype
            or tensor.shape != shape
            or tensor.device != self.device
            or not tensor.is_contiguous()
        ):
            raise ValueError(
                f"{op}: {name} must be contiguous {dtype} {list(shape)} on {self.device}, not {_describe(tensor)}"
            )
        return tensor.data_ptr()

    def optional(self, op: str, name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
        """As ``contiguous``; 0 if there is no tensor."""
        return 0 if tensor is None else self.contiguous(op, name, tensor, dtype, shape)

    def rows(self, op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, int]:
        """Address and row stride of a tensor whose rows are contiguous, but may lie apart; else ValueError."""
        if tensor.dtype is not dtype or tensor.shape != shape or tensor.device != self.device:
            raise ValueError(f"{op}: {name} must be {dtype} {list(shape)} on {self.device}, not {_describe(tensor)}")
        if not tensor.is_contiguous():
            expected = 1
            for size, stride in zip(reversed(shape[1:]), reversed(tensor.stride()[1:]), strict=True):
                if size != 1 and stride != expected:
                    raise ValueError(f"{op}: each row of {name} must be contiguous, not {_describe(tensor)}")
                expected *= size
        return tensor.data_ptr(), tensor.stride(0)

    def heads(self, op: str, name: str, x: Tensor) -> tuple[int, int, int]:
        """``[tokens, heads, head_dim]`` of x; ValueError for another rank or a head_dim without a kernel."""
        if x.dim() != 3:
            raise ValueError(f"{op}: {name} must be [tokens, heads, head_dim], not {list(x.shape)}")
        n, heads, head_dim = x.shape
        if head_dim % 8 or not 8 <= head_dim <= self.max_head_dim:
            raise ValueError(f"{op}: head_dim must be a multiple of 8 up to {self.max_head_dim}, not {head_dim}")
        return n, heads, head_dim


def matrix(op: str, x: Tensor) -> tuple[int, int]:
    """``[rows, width]`` of x; ValueError for another rank."""
    if x.dim() != 2:
        raise ValueError(f"{op}: x must be a matrix, not {list(x.shape)}")
    n, width = x.shape
    return n, width


def cache_shape(op: str, cache: Tensor) -> tuple[int, int, int, int]:
    """``[pages, page_size, kv_heads, head_dim]`` of a KV cache; ValueError for another rank."""
    if cache.dim() != 4:
        raise ValueError(f"{op}: k_cache must be [pages, page_size, kv_heads, head_dim], not {list(cache.shape)}")
    pages, page_size, heads, head_dim = cache.shape
    return pages, page_size, heads, head_dim


def group_size(op: str, query_heads: int, kv_heads: int) -> int:
    """Query heads that share a KV head; ValueError if they cannot be divided."""
    if kv_heads == 0 or query_heads % kv_heads:
        raise ValueError(f"{op}: {query_heads} query heads cannot be divided among {kv_heads} KV heads")
    return query_heads // kv_heads


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"

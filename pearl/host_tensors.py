"""Small tensors from Python numbers, and back: what a round hands to the kernels, and what it reads of them.

On a GPU both directions go through pinned memory, in one transfer, and wait for nothing: torch keeps a pinned block
from being reused until the device has passed the transfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NUMPY = {torch.int32: np.int32, torch.int64: np.int64, torch.float32: np.float32}
_ALIGNMENT = 16  # bytes, of each tensor in a transfer: the kernels' wide loads

Array = np.ndarray[Any, Any]


def array(values: Iterable[float] | Sequence[Sequence[float]], dtype: torch.dtype) -> Array:
    """Of int32, int64 or float32. On short lists a third of the time of ``torch.tensor``."""
    return np.array(values if isinstance(values, Sequence) else list(values), dtype=_NUMPY[dtype])


def from_numbers(
    values: Iterable[float] | Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A tensor of int32, int64 or float32."""
    return upload([array(values, dtype)], device)[0]


def upload(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on ``device``, in one transfer on its current stream."""
    if device.type == "cpu":
        return [torch.from_numpy(a) for a in arrays]
    layout = Layout.of(arrays)
    return layout.views(layout.pack(arrays, pinned=True).to(device, non_blocking=True))


def start_download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """CPU tensors that hold the values once the device's current stream has come this far; CPU tensors as they are."""
    return [
        tensor
        if tensor.device.type == "cpu"
        else torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for tensor in tensors
    ]


def send_rows(tensor: Tensor, rows: Sequence[int], device: torch.device) -> Tensor:
    """These rows of a tensor on another device, in order there behind its current stream."""
    index = from_numbers(rows, torch.int64, tensor.device)
    if tensor.device.type != "cpu" or device.type == "cpu":
        return tensor[index].to(device, non_blocking=True)
    staged = torch.empty((len(rows), *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=True)
    torch.index_select(tensor, 0, index, out=staged)
    return staged.to(device, non_blocking=True)


@dataclass(frozen=True)
class Layout:
    """Where arrays of known shapes and dtypes lie in one buffer."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    offsets: tuple[int, ...]  # in bytes; the last one is the size of all

    @classmethod
    def of(cls, arrays: Sequence[Array]) -> Layout:
        sizes = (-(-a.nbytes // _ALIGNMENT) * _ALIGNMENT for a in arrays)
        dtypes = tuple(torch.from_numpy(a[:0]).dtype for a in arrays)
        return cls(tuple(a.shape for a in arrays), dtypes, tuple(accumulate(sizes, initial=0)))

    def pack(self, arrays: Sequence[Array], pinned: bool) -> Tensor:
        """uint8 ``[size]`` on the CPU. The arrays' shapes and dtypes must be the layout's."""
        buffer = torch.empty(self.offsets[-1], dtype=torch.uint8, pin_memory=pinned)
        for view, a in zip(self.views(buffer), arrays, strict=True):
            view.copy_(torch.from_numpy(a))
        return buffer

    def views(self, buffer: Tensor) -> list[Tensor]:
        views = []
        for shape, dtype, begin in zip(self.shapes, self.dtypes, self.offsets, strict=False):
            count = int(np.prod(shape, dtype=np.int64))
            views.append(buffer[begin : begin + count * dtype.itemsize].view(dtype).view(shape))
        return views

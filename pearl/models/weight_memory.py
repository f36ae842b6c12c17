"""Where a model's weights lie: on a CPU side by side in memory of their own, in huge pages where the system has them.

A forward passes through all of its weights once. In pages of 4 KB it also passes through a page table entry for each,
which costs more than a tenth of a small model's time; and what a page's place in memory does to the caches differs from
process to process.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from pearl.errors import ModelLoadError
from pearl_kernels import LinearWeight

_HUGE_PAGE = 2 << 20
_CHUNK = 64 << 20  # of address space: what no weight is written to is not there
_ALIGNMENT = 64  # bytes, a cache line


class WeightMemory:
    """Belongs to the loading of one model; its memory lives as long as a tensor in it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._chunk = torch.empty(0, dtype=torch.uint8)  # what is left of it

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy that holds nothing else in memory, as a view of a file would; on other devices than a CPU
        the tensor itself.
        """
        if self._device.type != "cpu":
            return tensor
        return self._room(tensor.shape, tensor.dtype).copy_(tensor)

    def keep_matrix(self, weight: LinearWeight) -> LinearWeight:
        """The same with what a provider packed."""
        scale = None if weight.scale is None else self.keep(weight.scale)
        offset = None if weight.offset is None else self.keep(weight.offset)
        return replace(weight, data=self.keep(weight.data), scale=scale, offset=offset)

    def keep_stack(self, weights: Iterable[LinearWeight], count: int) -> LinearWeight:
        """``count`` packed matrices of one shape, as ``stack_weights`` joins them; one of them is in memory beside the
        stack. Raises ModelLoadError if some have offsets and others none.
        """
        stack: LinearWeight | None = None
        for index, weight in enumerate(weights):
            tensors = {field.name: getattr(weight, field.name) for field in fields(weight)}
            tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
            if stack is None:
                rooms: dict[str, Any] = {n: self._room((count, *t.shape), t.dtype) for n, t in tensors.items()}
                stack = replace(weight, **rooms)
            if tensors.keys() != rooms.keys():
                raise ModelLoadError(
                    "some experts of a layer have zero points and others none, against quantization_config (sym, "
                    "symmetric); correct it there, or take the unquantised checkpoint"
                )
            for name, tensor in tensors.items():
                getattr(stack, name)[index].copy_(tensor)
        assert stack is not None  # there is at least one
        return stack

    def _room(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised."""
        if self._device.type != "cpu":
            return torch.empty(tuple(shape), dtype=dtype, device=self._device)
        nbytes = math.prod(shape) * dtype.itemsize
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > self._chunk.nbytes:
            self._chunk = _map(max(size, _CHUNK))
        block, self._chunk = self._chunk[:nbytes], self._chunk[size:]
        return block.view(dtype).view(tuple(shape))


def return_freed() -> None:
    """What was freed while a model was loaded goes back to the system, where C's library can be asked to (glibc): some
    40 MB of pieces between others that are still held.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # TypeError: of Windows, which has no library None
        ctypes.CDLL(None).malloc_trim(0)


def _map(size: int) -> Tensor:
    """uint8 ``[>= size]`` of zeros from the begin of a huge page on, unmapped when the last view of it is gone."""
    size = -(-size // _HUGE_PAGE) * _HUGE_PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size} bytes for weights: {error.strerror}") from error  # no OSError: of no file or output
    with contextlib.suppress(OSError):  # a kernel that was built without them refuses
        memory.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(memory, dtype=torch.uint8)
    return block[-block.data_ptr() % _HUGE_PAGE :][:size]

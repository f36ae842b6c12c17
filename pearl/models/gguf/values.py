"""The numbers of one tensor of a GGUF file, decoded as they are asked for."""

from __future__ import annotations

from types import EllipsisType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pearl.models.gguf.blocks import KEPT, BlockStorage
from pearl.models.gguf.header import StoredTensor
from pearl.models.gguf.package import decode
from pearl.models.quantized_storage import WEIGHT
from pearl_kernels import QuantizedMatrix

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DECODED = 1 << 22  # numbers that are decoded at a time


class TensorValues:
    """What safetensors' slices are to a folder's tensors.

    ``heads``: rows are those of so many heads of queries or keys. In the file lanes 2i and 2i + 1 of a head are rotated
    together; rows are given in transformers' order, where lanes i and i + D/2 are. 0: they are as they are.
    ``shift`` is added.
    """

    def __init__(self, stored: StoredTensor, heads: int = 0, shift: float = 0.0) -> None:
        self._stored, self._heads, self._shift = stored, heads, shift

    @property
    def name(self) -> str:
        return self._stored.name

    def get_shape(self) -> tuple[int, ...]:
        return self._stored.shape

    def get_dtype(self) -> str:
        """safetensors' name of what is given: blocks are decoded to fp32."""
        name = self._stored.kind.name
        return name if name in PLAIN else "F32"

    def __getitem__(self, part: slice | tuple[slice, ...] | EllipsisType) -> Tensor:
        """A copy of the spans of rows, and of columns, that are named."""
        spans = () if isinstance(part, EllipsisType) else part if isinstance(part, tuple) else (part,)
        rows, *columns = spans or (slice(None),)
        order = self._order()[rows] if self._heads else rows
        if len(self._stored.shape) == 1:
            values = self._decoded(self._raw().reshape(1, -1))[0][order]
        else:
            values = self._decoded(self._raw().reshape(self._stored.shape[0], -1)[order])
        values = values[:, columns[0]] if columns else values
        return values + self._shift if self._shift else values

    def quantized(self) -> QuantizedMatrix | None:
        """The whole matrix in its few bits; None if it is plain, or its blocks are no groups that a kernel knows."""
        kind, shape = self._stored.kind.name, self._stored.shape
        if kind not in KEPT or len(shape) != 2:
            return None
        rows = np.array(self._raw().reshape(shape[0], -1)[self._order() if self._heads else slice(None)])
        return BlockStorage(kind).read({WEIGHT: torch.from_numpy(rows)}, *shape)

    def _raw(self) -> NDArray[np.uint8]:
        stored = self._stored
        return np.frombuffer(stored.data, np.uint8, stored.end - stored.begin, stored.begin)

    def _order(self) -> NDArray[np.intp]:
        """Which of the file's rows is row i."""
        order: NDArray[np.intp] = (
            np.arange(self._stored.shape[0]).reshape(self._heads, -1, 2).transpose(0, 2, 1).ravel()
        )
        return order

    def _decoded(self, rows: NDArray[np.uint8]) -> Tensor:
        """``[R, bytes]`` to ``[R, N]``, in memory of its own."""
        kind, width = self._stored.kind, self._stored.shape[-1]
        values = torch.empty((rows.shape[0], width), dtype=PLAIN.get(kind.name, torch.float32))
        if kind.name in PLAIN:
            values.view(torch.uint8).copy_(torch.from_numpy(np.array(rows, order="C")))
            return values
        step = max(1, _DECODED // width)
        for begin in range(0, rows.shape[0], step):
            part = np.ascontiguousarray(rows[begin : begin + step])
            values[begin : begin + step] = torch.from_numpy(decode(part, kind))
        return values

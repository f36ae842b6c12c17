"""The forms in which checkpoints hold the matrices of experts, as each expert's own ones under one name.

One matrix each, ``mlp.experts.N.gate_proj.weight``, as Qwen's and most other checkpoints have them; Mixtral's
``block_sparse_moe.experts.N.w1.weight`` (w1: gate, w3: up, w2: down); or all experts' in two tensors,
``mlp.experts.gate_up_proj`` ``[E, 2F, D]`` and ``down_proj`` ``[E, D, F]``, as transformers 5 holds them in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pearl.models.model_source import StoredValues

_STACK = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)$")
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def modern_name(stored: str) -> str:
    """The name that another family's checkpoint would have for it."""
    name = stored.replace(".block_sparse_moe.", ".mlp.")
    return re.sub(
        r"(\.mlp\.experts\.\d+\.)(w[123])\.", lambda match: f"{match[1]}{_PROJECTIONS[match[2]]}.", name
    )  # fmt: skip


def each_expert(name: str, values: StoredValues) -> Iterator[tuple[str, StoredValues]]:
    """The experts' own matrices, where a tensor holds those of all; else the tensor itself."""
    match, shape = _STACK.match(name), tuple(values.get_shape())
    if match is None or len(shape) != 3:
        yield name, values
        return
    prefix, merged = match[1], match[2] == "gate_up_proj"
    parts = {"gate_proj": (0, shape[1] // 2), "up_proj": (shape[1] // 2, shape[1])}
    for expert in range(shape[0]):
        for projection, span in (parts if merged else {"down_proj": (0, shape[1])}).items():
            yield f"{prefix}{expert}.{projection}.weight", _Matrix(values, expert, *span)


class _Matrix:
    """Rows [begin, end) of one matrix of a stack."""

    def __init__(self, stack: StoredValues, expert: int, begin: int, end: int) -> None:
        self._stack, self._expert, self._begin, self._end = stack, expert, begin, end

    def get_shape(self) -> Sequence[int]:
        return self._end - self._begin, self._stack.get_shape()[2]

    def get_dtype(self) -> str:
        return self._stack.get_dtype()

    def __getitem__(self, part: slice | tuple[slice, ...] | EllipsisType) -> Tensor:
        spans = () if isinstance(part, EllipsisType) else part if isinstance(part, tuple) else (part,)
        rows, columns = (*spans, slice(None), slice(None))[:2]
        wanted = range(self._begin, self._end)[rows]
        expert = slice(self._expert, self._expert + 1)
        return self._stack[expert, slice(wanted.start, wanted.stop), columns][0]

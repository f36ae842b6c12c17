"""The forms in which checkpoints hold the tensors of experts, as each expert's own ones under one name.

One matrix each, ``mlp.experts.N.gate_proj.weight``, as Qwen's and most other checkpoints have them; Mixtral's
``block_sparse_moe.experts.N.w1.weight`` (w1: gate, w3: up, w2: down); or all experts' in two tensors,
``mlp.experts.gate_up_proj`` ``[E, 2F, D]`` and ``down_proj`` ``[E, D, F]``, as transformers 5 holds them in memory.

gpt-oss's two are *interleaved*: gates and ups in turns, and inputs before outputs, ``[E, D, 2F]`` and ``[E, F, D]``;
so are their biases, ``gate_up_proj_bias`` ``[E, 2F]`` and ``down_proj_bias`` ``[E, D]``, and what MXFP4 has in their
place, ``_blocks`` ``[E, outputs, inputs / 32, 16]`` and ``_scales`` ``[E, outputs, inputs / 32]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from pearl.models.model_source import StoredValues

_STACK = re.compile(r"(.*\.mlp\.experts\.)(gate_up_proj|down_proj)(_bias|_blocks|_scales)?$")
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# By what a stack's name ends in: what each expert's part is called, and dimensions of the stack.
_PARTS = {None: ("weight", 3), "_bias": ("bias", 2), "_blocks": ("weight_blocks", 4), "_scales": ("weight_scales", 3)}


def modern_name(stored: str) -> str:
    """The name that another family's checkpoint would have for it."""
    name = stored.replace(".block_sparse_moe.", ".mlp.").replace(".mlp.router.", ".mlp.gate.")
    return re.sub(
        r"(\.mlp\.experts\.\d+\.)(w[123])\.", lambda match: f"{match[1]}{_PROJECTIONS[match[2]]}.", name
    )  # fmt: skip


def each_expert(name: str, values: StoredValues, interleaved: bool = False) -> Iterator[tuple[str, StoredValues]]:
    """The experts' own tensors, where one holds those of all; else the tensor itself."""
    match, shape = _STACK.match(name), tuple(values.get_shape())
    last, dimensions = _PARTS[match[3]] if match is not None else ("", 0)
    if match is None or len(shape) != dimensions or (match[3] and not interleaved):
        yield name, values
        return
    by_inputs = interleaved and match[3] is None
    outputs = shape[2] if by_inputs else shape[1]
    parts = {"down_proj": range(outputs)}
    if match[2] == "gate_up_proj" and interleaved:
        parts = {"gate_proj": range(0, outputs, 2), "up_proj": range(1, outputs, 2)}
    elif match[2] == "gate_up_proj":
        parts = {"gate_proj": range(outputs // 2), "up_proj": range(outputs // 2, outputs)}
    for expert in range(shape[0]):
        for projection, rows in parts.items():
            yield f"{match[1]}{expert}.{projection}.{last}", _OfExpert(values, expert, rows, by_inputs)


class _OfExpert:
    """What one expert has of a stack for some of its outputs, which come first, whichever way the stack lies."""

    def __init__(self, stack: StoredValues, expert: int, outputs: range, by_inputs: bool) -> None:
        self._stack, self._expert, self._outputs, self._by_inputs = stack, expert, outputs, by_inputs

    def get_shape(self) -> Sequence[int]:
        _, first, *rest = self._stack.get_shape()
        return (len(self._outputs), first) if self._by_inputs else (len(self._outputs), *rest)

    def get_dtype(self) -> str:
        return self._stack.get_dtype()

    def __getitem__(self, part: slice | tuple[slice, ...] | EllipsisType) -> Tensor:
        spans = () if isinstance(part, EllipsisType) else part if isinstance(part, tuple) else (part,)
        wanted = self._outputs[spans[0]] if spans else self._outputs
        expert, run = slice(self._expert, self._expert + 1), slice(wanted.start, wanted.stop)
        if self._by_inputs:
            inputs = spans[1] if len(spans) > 1 else slice(None)
            return self._stack[expert, inputs, run][0, :, :: wanted.step].T
        part_of_stack: tuple[slice, ...] = (expert, run, *spans[1:])
        return self._stack[part_of_stack][0, :: wanted.step]

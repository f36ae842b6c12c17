"""How quantised matrices lie in files: which tensors one has in place of its weight, and what their numbers mean.

Every class reads a matrix ``[M, K]`` into the one description of ``pearl_kernels``, or into fp32 numbers where its
groups are no runs of inputs. Here: a number to a byte; in words of 32 bits: ``packed_storage``. Sources: the
compressed-tensors formats, DeepSeek-V3's block-wise fp8, TensorRT Model Optimizer's checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from pearl_kernels import QuantizedMatrix

Bits = Literal[4, 8]
Shape = tuple[int, ...]
FLOATS = frozenset({"F32", "F16", "BF16"})  # safetensors' names
INT8, FP8 = frozenset({"I8"}), frozenset({"F8_E4M3"})
WEIGHT = "weight"
# Of activations that were to be quantised too: they play no part where only weights are.
ACTIVATION_SCALES = frozenset({"input_scale", "input_zero_point", "output_scale", "activation_scale"})


class Part(NamedTuple):
    """One tensor of a matrix: the shapes it may have, and safetensors' names of its dtypes."""

    shapes: tuple[Shape, ...]
    dtypes: frozenset[str]
    required: bool = True


class FewBits(NamedTuple):
    """A matrix as a kernel may hold it. ``group``: inputs that share a scale; ``offsets``: and an offset beside it."""

    bits: Bits
    group: int
    offsets: bool
    fp8: bool = False

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Numbers, and an fp32 scale and maybe an offset for each group; padding aside."""
        groups = -(-inputs // self.group)
        return outputs * inputs * self.bits // 8 + 4 * outputs * groups * (2 if self.offsets else 1)


class Storage(Protocol):
    """``ordered``: whether inputs may belong to any group, by the settings."""

    @property
    def ordered(self) -> bool: ...

    def few_bits(self, inputs: int) -> FewBits:
        """How a matrix can be held whose groups are runs of inputs."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """Last parts of the names of the tensors that a matrix may have."""
        ...

    def parts(self, outputs: int, inputs: int, stored: Collection[str]) -> Mapping[str, Part]:
        """What a matrix must or may have by its last names, given those that are there."""
        ...

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedMatrix | Tensor:
        """Of tensors that are as ``parts`` says. Raises ModelLoadError for numbers that contradict it."""
        ...


@dataclass(frozen=True)
class Scales:
    """How many weights share a scale: all, a row ("channel"), ``columns`` inputs of a row ("group"), or a block."""

    kind: Literal["tensor", "channel", "group", "block"]
    rows: int = 1  # of a block
    columns: int = 0

    def shapes(self, outputs: int, inputs: int) -> tuple[Shape, ...]:
        if self.kind == "tensor":
            return ((), (1,), (1, 1))
        if self.kind == "channel":
            return ((outputs, 1), (outputs,))
        return ((-(-outputs // self.rows), -(-inputs // self.columns)),)

    def group_of(self, inputs: int) -> int:
        return inputs if self.kind in ("tensor", "channel") else self.columns

    def of_rows(self, scale: Tensor, outputs: int) -> Tensor:
        """fp32 ``[M, G]``."""
        if self.kind == "tensor":
            return scale.float().reshape(1, 1).expand(outputs, 1).contiguous()
        if self.kind == "channel":
            return scale.float().reshape(outputs, 1)
        return scale.float().repeat_interleave(self.rows, 0)[:outputs]


@dataclass(frozen=True)
class Fp8Storage:
    """fp8 numbers (e4m3) in ``weight``, multiplied by their scale; ``scale_names``: what that may be called."""

    scales: Scales
    scale_names: tuple[str, ...]
    ordered: bool = False

    @property
    def names(self) -> frozenset[str]:
        return ACTIVATION_SCALES | {WEIGHT, *self.scale_names}

    def few_bits(self, inputs: int) -> FewBits:
        return FewBits(8, self.scales.group_of(inputs), offsets=False, fp8=True)

    def parts(self, outputs: int, inputs: int, stored: Collection[str]) -> Mapping[str, Part]:
        scale = next((name for name in self.scale_names if name in stored), self.scale_names[0])
        return {
            WEIGHT: Part(((outputs, inputs),), FP8),
            scale: Part(self.scales.shapes(outputs, inputs), FLOATS),
        }

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedMatrix | Tensor:
        scale = next(tensors[name] for name in self.scale_names if name in tensors)
        of_rows = self.scales.of_rows(scale, outputs)
        return QuantizedMatrix(tensors[WEIGHT], of_rows, None, self.scales.group_of(inputs), 8)


@dataclass(frozen=True)
class Int8Storage:
    """int8 numbers in ``weight`` (compressed-tensors' int-quantized), less a zero point of their scale's shape."""

    scales: Scales
    symmetric: bool
    ordered: bool = False

    @property
    def names(self) -> frozenset[str]:
        return ACTIVATION_SCALES | {WEIGHT, "weight_scale", "weight_zero_point"}

    def few_bits(self, inputs: int) -> FewBits:
        return FewBits(8, self.scales.group_of(inputs), offsets=not self.symmetric)

    def parts(self, outputs: int, inputs: int, stored: Collection[str]) -> Mapping[str, Part]:
        shapes = self.scales.shapes(outputs, inputs)
        parts = {WEIGHT: Part(((outputs, inputs),), INT8), "weight_scale": Part(shapes, FLOATS)}
        return parts if self.symmetric else {**parts, "weight_zero_point": Part(shapes, INT8)}

    def read(self, tensors: Mapping[str, Tensor], outputs: int, inputs: int) -> QuantizedMatrix | Tensor:
        scale = self.scales.of_rows(tensors["weight_scale"], outputs)
        zero = None if self.symmetric else self.scales.of_rows(tensors["weight_zero_point"], outputs)
        offset = None if zero is None else -zero * scale
        return QuantizedMatrix(tensors[WEIGHT], scale, offset, self.scales.group_of(inputs), 8)

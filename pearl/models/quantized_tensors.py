"""The quantised matrices of a checkpoint, checked against its description before any of them is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pearl.errors import ModelLoadError
from pearl.models.decoder_tensors import StoredTensor, matrix_shapes
from pearl.models.packed_storage import in_order
from pearl.models.quantization import Quantization, require_quantized
from pearl.models.quantized_storage import ACTIVATION_SCALES, WEIGHT, Storage
from pearl_kernels import QuantizedMatrix
from pearl_kernels.reference import dequantize

_SUFFIX = f".{WEIGHT}"
_INDICES = {"g_idx", "weight_g_idx"}  # of inputs' groups


def quantized_names(quantization: Quantization | None, table: Mapping[str, StoredTensor]) -> set[str]:
    """Of all tensors that the table's matrices may have in place of their weights."""
    if quantization is None:
        return set()
    return {f"{module}.{name}" for module in matrix_shapes(table) for name in quantization.method.storage.names}


class QuantizedTensors:
    """``stored``: slices by the decoder's names; what belongs to quantised matrices is taken out of it.

    Raises ModelLoadError, with the method's and a tensor's name, for what is missing, of another shape or dtype, or
    against the description.
    """

    def __init__(
        self, folder: Path, quantization: Quantization, stored: dict[str, Any], table: Mapping[str, StoredTensor]
    ) -> None:
        self._folder, self._method = folder, quantization.method
        self._found: dict[str, dict[str, Any]] = {}
        for module, (outputs, inputs) in matrix_shapes(table).items():
            names = {name for name in self._storage.names if f"{module}.{name}" in stored}
            weight = stored[module + _SUFFIX].get_dtype() if WEIGHT in names else None
            dtypes = self._storage.parts(outputs, inputs, names).get(WEIGHT)
            if not names - {WEIGHT} and (dtypes is None or weight not in dtypes.dtypes):
                continue  # plain, or missing
            self._found[module] = {name: stored.pop(f"{module}.{name}") for name in names}
            self._check(module, outputs, inputs)
        require_quantized(folder, quantization, self._found)
        self._shapes = {module: shape for module, shape in matrix_shapes(table).items() if module in self._found}

    @property
    def matrices(self) -> frozenset[str]:
        """Names of modules."""
        return frozenset(self._found)

    @property
    def shuffled(self) -> frozenset[str]:
        """Those in which an input's group is another than its place says. Reads the numbers of groups."""
        return frozenset(module for module in self._found if self._is_shuffled(module))

    def read(self, module: str) -> QuantizedMatrix | Tensor:
        """As stored, or fp32 numbers where no kernel takes its groups. Raises ModelLoadError."""
        tensors = {name: part[...] for name, part in self._found[module].items() if name not in ACTIVATION_SCALES}
        try:
            return self._storage.read(tensors, *self._shapes[module])
        except ModelLoadError as error:
            raise ModelLoadError(f"{self._folder}: {module!r}, of {self._method.name}: {error}") from error

    def decoded(self, module: str) -> Tensor:
        """fp32 ``[M, K]``."""
        matrix = self.read(module)
        return matrix if isinstance(matrix, Tensor) else dequantize(matrix)

    @property
    def _storage(self) -> Storage:
        return self._method.storage

    def _is_shuffled(self, module: str) -> bool:
        group = self._storage.few_bits(self._shapes[module][1]).group
        return not all(
            in_order(self._found[module][name][...], group) for name in _INDICES & self._found[module].keys()
        )

    def _check(self, module: str, outputs: int, inputs: int) -> None:
        found, method = self._found[module], self._method.name
        parts = self._storage.parts(outputs, inputs, found)
        for name, part in parts.items():
            tensor = f"'{module}.{name}'"
            if name not in found:
                if part.required:
                    raise ModelLoadError(f"{self._folder} has no tensor {tensor}, which {method} stores for a matrix")
                continue
            shape, dtype = tuple(found[name].get_shape()), found[name].get_dtype()
            if shape not in part.shapes:
                raise ModelLoadError(
                    f"{self._folder}: {tensor} has shape {shape}, {method} calls for {part.shapes[-1]} where a matrix "
                    f"is {(outputs, inputs)}"
                )
            if dtype not in part.dtypes:
                wanted = " or ".join(sorted(part.dtypes))
                raise ModelLoadError(f"{self._folder}: {tensor} is stored as {dtype}, {method} calls for {wanted}")
        if unused := sorted(found.keys() - parts.keys() - ACTIVATION_SCALES):
            raise ModelLoadError(
                f"{self._folder} holds '{module}.{unused[0]}', which {method} with these settings does not use: its "
                "output would be wrong; check quantization_config"
            )

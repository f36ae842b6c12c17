"""``pack_linear`` and ``linear`` in C++; meaning as in ``pearl_kernels.reference.layers``."""

from __future__ import annotations

import torch
from torch import Tensor

from pearl_kernels.checks import matrix
from pearl_kernels.cpu import _core
from pearl_kernels.cpu.checks import CHECKS
from pearl_kernels.reference import LinearWeight, QuantizedMatrix, WeightFormat, dequantize
from pearl_kernels.reference import pack_linear as reference_pack

_FULL, _INT8, _GROUP_INT4, _GROUP_INT8 = range(4)  # WeightFormat of params.h
_GROUP_STEP = {4: 8, 8: 2}  # inputs of a step, by bits


def pack_linear(weight: Tensor, weights: WeightFormat = "full") -> LinearWeight:
    """Panels of ``_core.PANEL_COLUMNS`` rows of weight, padded with zeros: ``WeightFormat`` in params.h."""
    CHECKS.beside("pack_linear", "weight", weight).floating("pack_linear", "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"pack_linear: weight must be a matrix, not {list(weight.shape)}")
    plain = reference_pack(weight, weights)
    rows, columns, panel = plain.out_features, plain.in_features, _core.PANEL_COLUMNS
    step = 2 if weights == "int8" else 4 // weight.element_size()
    panels, steps = -(-rows // panel), -(-columns // step)
    padded = torch.nn.functional.pad(plain.data, (0, steps * step - columns, 0, panels * panel - rows))
    inputs = padded.view(panels, panel, steps, step)
    data = inputs.permute(0, 2, 3, 1) if weights == "int8" else inputs.permute(0, 2, 1, 3)
    return LinearWeight(data.contiguous(), rows, columns, plain.scale)


def pack_quantized(matrix: QuantizedMatrix, dtype: torch.dtype) -> LinearWeight:
    """Panels as of ``pack_linear``, integers in 4 or 8 bits, scales and offsets ``[panels, G, PANEL_COLUMNS]``.

    fp8, and groups that are not whole steps, are decoded.
    """
    CHECKS.beside("pack_quantized", "values", matrix.values)
    outputs, inputs = matrix.values.shape
    step = _GROUP_STEP[matrix.bits]
    whole = matrix.group >= inputs
    if matrix.values.dtype != torch.int8 or (matrix.group % step and not whole):
        return pack_linear(dequantize(matrix).to(dtype))
    panel = _core.PANEL_COLUMNS
    panels, steps = -(-outputs // panel), -(-inputs // step)
    padded = torch.nn.functional.pad(matrix.values, (0, steps * step - inputs, 0, panels * panel - outputs))
    values = padded.view(panels, panel, steps, step).transpose(1, 2)
    data = _four_bits(values) if matrix.bits == 4 else values.transpose(2, 3)
    offset = None if matrix.offset is None else _of_panels(matrix.offset, panels)
    group = steps * step if whole else matrix.group
    return LinearWeight(
        data.contiguous(), outputs, inputs, _of_panels(matrix.scale, panels), offset, group, matrix.bits
    )


def weight_format(weight: LinearWeight) -> int:
    """``WeightFormat`` of params.h."""
    if weight.scale is None:
        return _FULL
    if weight.group == 0:
        return _INT8
    return _GROUP_INT4 if weight.bits == 4 else _GROUP_INT8


def _four_bits(values: Tensor) -> Tensor:
    """``[..., 8]`` integers in [-8, 7] as the four bytes of a word: inputs 0, 2, 4, 6, then 1, 3, 5, 7."""
    nibbles = (values & 15).view(torch.uint8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def _of_panels(groups: Tensor, panels: int) -> Tensor:
    panel = _core.PANEL_COLUMNS
    padded = torch.nn.functional.pad(groups, (0, 0, 0, panels * panel - groups.shape[0]))
    return padded.view(panels, panel, -1).transpose(1, 2).contiguous()


def weight_rows(weight: LinearWeight, rows: Tensor) -> Tensor:
    """As the reference."""
    _require_packed("weight_rows", weight)
    if weight.scale is not None:
        raise ValueError("weight_rows: a quantised weight no longer has the numbers that were packed")
    checks = CHECKS.beside("weight_rows", "weight", weight.data)
    checks.contiguous("weight_rows", "rows", rows, torch.int64, (len(rows),))
    panel = _core.PANEL_COLUMNS
    steps = weight.data[rows // panel, :, rows % panel]
    return steps.flatten(1)[:, : weight.in_features].contiguous()


class ThreadedLinear:
    """``linear`` on a worker's own threads, which start at the first call and sleep between calls."""

    def __init__(self, threads: int) -> None:
        self._number = threads
        self._threads: _core.LinearThreads | None = None

    def __call__(self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
        """As the reference. A row of the result does not depend, to the bit, on the other rows or on the threads."""
        if self._threads is None:
            self._threads = _core.LinearThreads(self._number)
        return _linear(self._threads, x, weight, bias)


def linear(x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
    """As the reference, on the calling thread. A row of the result does not depend, to the bit, on the other rows."""
    return _linear(_core.LinearThreads(1), x, weight, bias)


def _linear(threads: _core.LinearThreads, x: Tensor, weight: LinearWeight, bias: Tensor | None) -> Tensor:
    data, width, out_width = weight.data, weight.in_features, weight.out_features
    _require_packed("linear", weight)
    checks = CHECKS.beside("linear", "x", x)
    code = checks.floating("linear", "x", x)
    dtype = data.dtype if weight.scale is None else x.dtype
    n, _ = matrix("linear", x)
    address, stride = checks.rows("linear", "x", x, dtype, (n, width))
    add = 0 if bias is None else checks.contiguous("linear", "bias", bias, dtype, (out_width,))
    out = x.new_empty((n, out_width))
    threads.linear(
        code, weight_format(weight), n, width, out_width, address, stride, data.data_ptr(), _address(weight.scale),
        _address(weight.offset), weight.group, add, out.data_ptr(),
    )  # fmt: skip
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _require_packed(op: str, weight: LinearWeight) -> None:
    if weight.data.dim() != 4:
        raise ValueError(f"{op}: weight must come from this provider's pack_linear")

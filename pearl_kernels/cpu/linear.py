"""``pack_linear`` and ``linear`` in C++; meaning as in ``pearl_kernels.reference.layers``."""

from __future__ import annotations

import torch
from torch import Tensor

from pearl_kernels.checks import matrix
from pearl_kernels.cpu import _core
from pearl_kernels.cpu.checks import CHECKS
from pearl_kernels.reference import LinearWeight, WeightFormat
from pearl_kernels.reference import pack_linear as reference_pack


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


def weight_rows(weight: LinearWeight, rows: Tensor) -> Tensor:
    """As the reference."""
    _require_packed("weight_rows", weight)
    if weight.scale is not None:
        raise ValueError("weight_rows: an int8 weight no longer has the numbers that were packed")
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
    data, scale, width, out_width = weight.data, weight.scale, weight.in_features, weight.out_features
    _require_packed("linear", weight)
    checks = CHECKS.beside("linear", "x", x)
    code = checks.floating("linear", "x", x)
    dtype = data.dtype if scale is None else x.dtype
    n, _ = matrix("linear", x)
    address, stride = checks.rows("linear", "x", x, dtype, (n, width))
    add = 0 if bias is None else checks.contiguous("linear", "bias", bias, dtype, (out_width,))
    out = x.new_empty((n, out_width))
    threads.linear(
        code, n, width, out_width, address, stride, data.data_ptr(), 0 if scale is None else scale.data_ptr(), add,
        out.data_ptr(),
    )  # fmt: skip
    return out


def _require_packed(op: str, weight: LinearWeight) -> None:
    if weight.data.dim() != 4:
        raise ValueError(f"{op}: weight must come from this provider's pack_linear")

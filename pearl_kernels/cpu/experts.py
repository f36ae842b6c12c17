"""``route`` and ``experts`` in C++; meaning as in ``pearl_kernels.reference.experts``."""

from __future__ import annotations

import torch
from torch import Tensor

from pearl_kernels.checks import matrix
from pearl_kernels.cpu import _core
from pearl_kernels.cpu.checks import CHECKS
from pearl_kernels.cpu.linear import weight_format
from pearl_kernels.operands import check_experts, check_route
from pearl_kernels.reference import ExpertWeights, LinearWeight, Routing


def route(logits: Tensor, top_k: int, renormalise: bool) -> Routing:
    """As the reference."""
    n, count, address, stride = check_route(CHECKS, logits, top_k)
    code = CHECKS.beside("route", "logits", logits).floating("route", "logits", logits)
    chosen = logits.new_empty((n, top_k), dtype=torch.int32)
    weights = logits.new_empty((n, top_k), dtype=torch.float32)
    _core.route(code, n, count, top_k, address, stride, renormalise, chosen.data_ptr(), weights.data_ptr())
    return Routing(chosen, weights)


class ThreadedExperts:
    """``experts`` on a worker's own threads and memory, both made at the first call."""

    def __init__(self, threads: int) -> None:
        self._number = threads
        self._threads: _core.ExpertThreads | None = None

    def __call__(
        self,
        x: Tensor,
        routing: Routing,
        weights: ExpertWeights,
        shared: Tensor | None = None,
        shared_gate: Tensor | None = None,
    ) -> Tensor:
        """As the reference. A row of the result does not depend, to the bit, on the other rows or on the threads.
        ValueError if an expert's number is out of range.
        """
        if self._threads is None:
            self._threads = _core.ExpertThreads(self._number)
        return _experts(self._threads, x, routing, weights, shared, shared_gate)


def experts(
    x: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
) -> Tensor:
    """As the reference, on the calling thread."""
    return _experts(_core.ExpertThreads(1), x, routing, weights, shared, shared_gate)


def native_experts(weights: ExpertWeights) -> _core.ExpertLayer:
    """What the C++ core takes, which holds addresses only."""
    unit = weights.unit
    return _core.ExpertLayer(
        _stack(weights.gate_up, weights.gate_up_bias),
        _stack(weights.down, weights.down_bias),
        unit.gain,
        unit.limit,
        unit.offset,
    )


def _experts(
    threads: _core.ExpertThreads,
    x: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    shared: Tensor | None,
    shared_gate: Tensor | None,
) -> Tensor:
    if weights.gate_up.data.dim() != 5 or weights.down.data.dim() != 5:
        raise ValueError("experts: weights must be stacks of this provider's pack_linear")
    n, _ = matrix("experts", x)
    top_k = check_experts(CHECKS, x, routing, weights, shared, shared_gate)
    out = torch.empty_like(x)
    threads.run(
        native_experts(weights),
        CHECKS.beside("experts", "x", x).floating("experts", "x", x),
        n,
        top_k,
        x.data_ptr(),
        routing.experts.data_ptr(),
        routing.weights.data_ptr(),
        0 if shared is None else shared.data_ptr(),
        0 if shared_gate is None else shared_gate.data_ptr(),
        out.data_ptr(),
    )
    return out


def _stack(weight: LinearWeight, bias: Tensor | None) -> _core.MatrixStack:
    tensors = weight.data, weight.scale, weight.offset, bias
    data, scale, offset, add = (0 if tensor is None else tensor.data_ptr() for tensor in tensors)
    strides = [0 if tensor is None else tensor.stride(0) * tensor.element_size() for tensor in tensors]
    first = _core.Matrix(
        weight_format(weight), weight.in_features, weight.out_features, data, scale, offset, weight.group, add
    )
    return _core.MatrixStack(weight.data.shape[0], first, *strides)

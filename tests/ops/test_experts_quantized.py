"""experts whose matrices stay in few bits, with every provider's own packing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from ops_support import DTYPE_NAMES, ULPS, Implementation, assert_rounds_to
from test_experts import GPT_OSS, Layer, everyone, exact, random_routing

from pearl_kernels import (
    ExpertWeights,
    GatedUnit,
    LinearWeight,
    QuantizedMatrix,
    Routing,
    cpu,
    reference,
    stack_weights,
)
from pearl_kernels.cpu.experts import ThreadedExperts
from pearl_kernels.reference import dequantize
from pearl_kernels.triton import OPERATORS as TRITON

PackQuantized = Callable[[QuantizedMatrix, torch.dtype], LinearWeight]
KINDS = ("int4", "int4+", "int8", "int8+", "fp8")
# Experts, width, feed-forward width, group: a last group that is not whole; groups for all inputs, odd; more columns
# than a tile, and blocks shorter than a group.
SHAPES = [(3, 80, 48, 32), (4, 45, 37, 45), (2, 192, 70, 96)]


def with_packing() -> list[Any]:
    """pytest parameters: an implementation of ``experts``, the packing that it reads, and a dtype that both know."""
    packings = {"cpu": cpu.OPERATORS["pack_quantized"], "triton": TRITON["pack_quantized"]}
    return [
        pytest.param(
            param.values[0],
            packings.get(str(param.id).split("-")[0], reference.pack_quantized),
            dtype,
            id=f"{param.id}-{DTYPE_NAMES[dtype]}",
            marks=param.marks,
        )
        for param in everyone("experts")
        for dtype in param.values[0].dtypes
    ]


every_provider = pytest.mark.parametrize(("experts", "pack", "dtype"), with_packing())


@dataclass(frozen=True)
class QuantizedLayer:
    gate_up: list[QuantizedMatrix]
    down: list[QuantizedMatrix]

    def packed(self, pack: PackQuantized, plain: Layer) -> ExpertWeights:
        dtype = plain.gate_up_bias.dtype if plain.gate_up_bias is not None else torch.float32
        stacks = (stack_weights([pack(matrix, dtype) for matrix in m]) for m in (self.gate_up, self.down))
        return ExpertWeights(*stacks, plain.gate_up_bias, plain.down_bias, plain.unit)

    def numbers(self, dtype: torch.dtype, unit: GatedUnit) -> Layer:
        """The matrices that are meant, and biases."""
        gate_up, down = (torch.stack([dequantize(matrix) for matrix in m]) for m in (self.gate_up, self.down))
        return Layer(
            gate_up, down, torch.randn(gate_up.shape[:2]).to(dtype), torch.randn(down.shape[:2]).to(dtype), unit
        )


def matrix_of(kind: str, m: int, k: int, group: int) -> QuantizedMatrix:
    bits, groups = 4 if "4" in kind else 8, -(-k // group)
    low = -(1 << bits - 1)
    values = torch.randint(low, -low, (m, k), dtype=torch.int8)
    if kind == "fp8":
        values = (torch.randn(m, k) * 40).to(torch.float8_e4m3fn)
    scale = (torch.rand(m, groups) + 0.1) * k**-0.5 / (40 if bits == 8 else 4)
    offset = torch.randn(m, groups) * k**-0.5 if "+" in kind else None
    return QuantizedMatrix(values, scale, offset, group, bits)  # type: ignore[arg-type]


def layer_of(kind: str, count: int, width: int, hidden: int, group: int) -> QuantizedLayer:
    return QuantizedLayer(
        [matrix_of(kind, 2 * hidden, width, group) for _ in range(count)],
        [matrix_of(kind, width, hidden, min(group, hidden)) for _ in range(count)],
    )


@every_provider
@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_the_numbers_that_are_meant(
    experts: Implementation, pack: PackQuantized, dtype: torch.dtype, kind: str
) -> None:
    slow = experts.emulated and dtype != torch.bfloat16
    for count, width, hidden, group in SHAPES if kind == "int4+" and not slow else SHAPES[:1]:
        own = layer_of(kind, count, width, hidden, group)
        plain = own.numbers(dtype, GPT_OSS)
        weights, routing = own.packed(pack, plain), random_routing(7, count, 2)
        x = torch.randn(7, width).to(dtype)
        out = experts(x, routing, weights)
        if kind == "fp8" and dtype == torch.bfloat16 and weights.gate_up.scale is None:
            continue  # decoded for lack of a kernel, and rounded then
        slack = 4e-5 if dtype == torch.float32 else ULPS[dtype] * 2.0**-5
        assert_rounds_to(out, exact(x, routing, plain, None, None), ULPS[dtype], tolerance=slack)
        if experts.function is not reference.experts and not slow:
            part = Routing(routing.experts[5:].contiguous(), routing.weights[5:].contiguous())
            assert torch.equal(experts(x[5:].contiguous(), part, weights), out[5:])


@every_provider
def test_few_bits_of_experts_without_rows_are_not_read(
    experts: Implementation, pack: PackQuantized, dtype: torch.dtype
) -> None:
    own = layer_of("int4+", 4, 64, 64, 32)
    plain = own.numbers(dtype, GatedUnit())
    weights, x = own.packed(pack, plain), torch.randn(5, 64).to(dtype)
    routing = random_routing(5, 4, 1)._replace(experts=torch.full((5, 1), 2, dtype=torch.int32))
    wanted = experts(x, routing, weights)
    for stack in (weights.gate_up, weights.down):
        for tensor in (stack.scale, stack.offset):
            tensor[[0, 1, 3]] = torch.nan  # type: ignore[index]
    assert torch.equal(experts(x, routing, weights), wanted)
    assert wanted.isfinite().all()


def test_threads_change_no_bit_of_few_bits() -> None:
    threaded = ThreadedExperts(3)
    for kind in ("int4", "int8+"):
        own = layer_of(kind, 5, 72, 40, 8)
        weights = own.packed(cpu.OPERATORS["pack_quantized"], own.numbers(torch.bfloat16, GatedUnit()))
        for n in (1, 8, 70):
            x, routing = torch.randn(n, 72).bfloat16(), random_routing(n, 5, 2)
            assert torch.equal(threaded(x, routing, weights), cpu.OPERATORS["experts"](x, routing, weights))


@pytest.mark.parametrize(("experts", "pack", "dtype"), [p for p in with_packing() if "triton" in str(p.id)][:1])
def test_int8_by_outputs_is_not_what_triton_multiplies(
    experts: Implementation, pack: PackQuantized, dtype: torch.dtype
) -> None:
    own = layer_of("int8", 2, 64, 64, 64)
    weights = own.packed(pack, own.numbers(dtype, GatedUnit()))
    stacks = {"gate_up": weights.gate_up, "down": weights.down}
    for name, stack in stacks.items():
        with pytest.raises(ValueError, match=f"experts: {name} is int8 by outputs"):
            experts(torch.ones(1, 64), random_routing(1, 2, 1), replace(weights, **{name: replace(stack, group=0)}))

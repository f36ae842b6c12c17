"""route and experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_support import (
    DTYPE_NAMES,
    DTYPES,
    ULPS,
    Implementation,
    assert_rounds_to,
    both_dtypes,
    each_dtype,
    emulated,
    implementations,
)
from torch import Tensor

from pearl_kernels import ExpertWeights, GatedUnit, LinearWeight, Routing, cpu, reference, stack_weights
from pearl_kernels.cpu.experts import ThreadedExperts
from pearl_kernels.reference import expert_weight

GPT_OSS = GatedUnit(gain=1.702, limit=1.5, offset=1.0)  # a lower limit, so that it is reached
Pack = Callable[[Tensor], LinearWeight]
# Rows, experts, experts of a row, width, feed-forward width: odd, one expert, all experts, more rows than a tile has.
SHAPES = [(1, 4, 2, 7, 5), (9, 8, 3, 48, 33), (37, 2, 2, 20, 24), (3, 40, 3, 140, 13), (3, 1, 1, 8, 8), (0, 4, 2, 8, 4)]


def everyone(op: str) -> list[Any]:
    return implementations(op, with_reference=True) + emulated(op)


def with_pack() -> list[Any]:
    """pytest parameters: an implementation of ``experts``, the packing that it reads, and a dtype that both know."""
    params = []
    for param in everyone("experts"):
        pack = cpu.OPERATORS["pack_linear"] if param.id.startswith("cpu") else reference.pack_linear
        params += [
            pytest.param(param.values[0], pack, dtype, id=f"{param.id}-{DTYPE_NAMES[dtype]}", marks=param.marks)
            for dtype in param.values[0].dtypes
        ]
    return params


every_provider = pytest.mark.parametrize(("experts", "pack", "dtype"), with_pack())


@dataclasses.dataclass(frozen=True)
class Layer:
    """Plain matrices of all experts, and biases."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    unit: GatedUnit

    def packed(self, pack: Pack) -> ExpertWeights:
        stacks = (stack_weights([pack(matrix) for matrix in m]) for m in (self.gate_up, self.down))
        return ExpertWeights(*stacks, self.gate_up_bias, self.down_bias, self.unit)


def layer(count: int, width: int, hidden: int, dtype: torch.dtype, unit: GatedUnit, biases: bool) -> Layer:
    gate_up, down = torch.randn(count, 2 * hidden, width) * width**-0.5, torch.randn(count, width, hidden)
    bias = torch.randn(count, 2 * hidden), torch.randn(count, width)
    made = [gate_up.to(dtype), (down * hidden**-0.5).to(dtype), *(b.to(dtype) if biases else None for b in bias)]
    return Layer(*made, unit)  # type: ignore[arg-type]


def random_routing(n: int, count: int, top_k: int) -> Routing:
    """Different experts in each row, weights that add up to anything."""
    return Routing(torch.rand(n, count).argsort(-1)[:, :top_k].int().contiguous(), torch.rand(n, top_k) + 0.1)


def exact(x: Tensor, routing: Routing, own: Layer, shared: Tensor | None, gate: Tensor | None) -> Tensor:
    """Every expert on every row, in double but for what is stored in between; weights of 0 where it was not chosen."""
    chosen = torch.zeros(x.shape[0], own.gate_up.shape[0], dtype=torch.double)
    chosen.scatter_(1, routing.experts.long(), routing.weights.double())
    hidden = torch.einsum("nd,efd->enf", x.double(), own.gate_up.double())
    hidden = hidden if own.gate_up_bias is None else hidden + own.gate_up_bias.double()[:, None]
    g, u = hidden.to(x.dtype).double().chunk(2, -1)
    g, u = g.clamp(max=own.unit.limit), u.clamp(-own.unit.limit, own.unit.limit)
    activated = (g / (1 + (-own.unit.gain * g).exp()) * (u + own.unit.offset)).to(x.dtype).double()
    made = torch.einsum("enf,edf->end", activated, own.down.double())
    made = made if own.down_bias is None else made + own.down_bias.double()[:, None]
    total = torch.einsum("ne,end->nd", chosen, made.to(x.dtype).double())
    return (total if shared is None else total + torch.sigmoid(gate.double()) * shared.double()).float()  # type: ignore[union-attr]


@every_provider
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_experts_are_the_weighted_sum(
    experts: Implementation, pack: Pack, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    n, count, top_k, width, hidden = shape
    for unit, biases, with_shared in ((GatedUnit(), False, False), (GPT_OSS, True, True)):
        own, routing = layer(count, width, hidden, dtype, unit, biases), random_routing(n, count, top_k)
        x = torch.randn(n, width).to(dtype)
        shared = torch.randn(n, width).to(dtype) if with_shared else None
        gate = torch.randn(n, 1).to(dtype) * 2 if with_shared else None
        out = experts(x, routing, own.packed(pack), shared, gate)
        assert out.dtype == dtype
        assert out.is_contiguous()
        # What is stored in between may round the other way: a unit of the parts, which are as large as the sum.
        slack = 2e-5 if dtype == torch.float32 else ULPS[dtype] * 2.0**-5
        assert_rounds_to(out, exact(x, routing, own, shared, gate), ULPS[dtype], tolerance=slack)


@every_provider
def test_a_row_does_not_depend_on_its_batch(experts: Implementation, pack: Pack, dtype: torch.dtype) -> None:
    n, count, top_k = 21, 3, 2
    own, routing = layer(count, 40, 24, dtype, GatedUnit(), True), random_routing(n, count, top_k)
    weights, x = own.packed(pack), torch.randn(n, 40).to(dtype)
    if experts.function is reference.experts:
        return  # torch's products round as they like
    together = experts(x, routing, weights)
    for rows in (slice(0, 1), slice(20, 21), slice(3, 11)):
        part = Routing(routing.experts[rows].contiguous(), routing.weights[rows].contiguous())
        assert torch.equal(experts(x[rows].contiguous(), part, weights), together[rows])


@every_provider
def test_experts_without_rows_are_not_read(experts: Implementation, pack: Pack, dtype: torch.dtype) -> None:
    """All rows on one expert, then on two: the others are NaN, and so is what nobody wrote."""
    own = layer(7, 30, 18, dtype, GPT_OSS, True)
    for tensor in (own.gate_up, own.down, own.gate_up_bias, own.down_bias):
        tensor[[0, 1, 3, 4, 6]] = torch.nan  # type: ignore[index]
    for chosen in ([2], [5], [2, 5]):
        routing = Routing(torch.tensor(chosen, dtype=torch.int32).repeat(19, 1), torch.rand(19, len(chosen)))
        x = torch.randn(19, 30).to(dtype)
        out = experts(x, routing, own.packed(pack))
        assert out.isfinite().all()
        wanted = reference.experts(x, routing, own.packed(reference.pack_linear))
        assert_rounds_to(out, wanted.float(), 2 * ULPS[dtype], tolerance=2e-5 if dtype == torch.float32 else 2e-2)


@every_provider
def test_nan_stays_in_its_row(experts: Implementation, pack: Pack, dtype: torch.dtype) -> None:
    own, routing = layer(4, 16, 12, dtype, GPT_OSS, False), random_routing(6, 4, 2)
    x = torch.randn(6, 16).to(dtype)
    x[2, 15] = torch.nan
    routing.weights[4, 1] = torch.nan
    out = experts(x, routing, own.packed(pack))
    assert [row for row in range(6) if out[row].isnan().any()] == [2, 4]
    assert out[[2, 4]].isnan().all()


@pytest.mark.parametrize(("route", "dtype"), each_dtype(everyone("route")))
def test_routes_are_the_likeliest_experts(route: Implementation, dtype: torch.dtype) -> None:
    for n, count, top_k in ((0, 4, 2), (1, 1, 1), (9, 8, 2), (3, 60, 4), (2, 130, 3), (4, 5, 5)):
        logits = (torch.randn(n, count) * 4).to(dtype)  # bf16 has ties
        probabilities = logits.double().softmax(-1)
        for renormalise in (False, True):
            chosen, weights = route(logits, top_k, renormalise)
            assert (chosen.dtype, weights.dtype) == (torch.int32, torch.float32)
            assert all(len(set(row)) == top_k for row in chosen.tolist())
            picked = logits.gather(1, chosen.long())
            assert torch.equal(picked, logits.sort(-1, descending=True).values[:, :top_k])
            expected = probabilities.gather(1, chosen.long())
            expected = expected / expected.sum(-1, keepdim=True) if renormalise else expected
            torch.testing.assert_close(weights, expected.float(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("route", everyone("route"))
def test_of_equal_logits_the_lower_number_comes_first(route: Implementation) -> None:
    logits = torch.tensor(
        [[1.0, 2.0, 2.0, -3.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0], [-torch.inf, 5.0, -torch.inf, 5.0, 1]]
    )
    assert route(logits, 4, True).experts.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [1, 3, 4, 0]]
    assert route(logits, 3, False).weights[2, 2] == pytest.approx(torch.tensor([5.0, 5, 1]).softmax(0)[2].item())


@pytest.mark.parametrize("route", everyone("route"))
def test_rows_of_logits_may_lie_apart(route: Implementation) -> None:
    logits = torch.randn(5, 9)
    wide = torch.full((5, 33), 50.0)
    wide[:, 8:17] = logits
    for apart, together in zip(route(wide[:, 8:17], 3, True), route(logits, 3, True), strict=True):
        assert torch.equal(apart, together)


@pytest.mark.parametrize("route", everyone("route"))
@pytest.mark.parametrize("renormalise", [False, True])
def test_a_nan_is_told_by_the_weights(route: Implementation, renormalise: bool) -> None:
    logits = torch.randn(3, 6)
    logits[1, 4] = torch.nan
    chosen, weights = route(logits, 2, renormalise)
    assert weights[1].isnan().all()
    assert weights[[0, 2]].isfinite().all()
    assert ((chosen >= 0) & (chosen < 6)).all()


@pytest.mark.parametrize("route", everyone("route"))
def test_extreme_logits_overflow_nothing(route: Implementation) -> None:
    chosen, weights = route(torch.tensor([[-1e30, 3e38, 0.0], [-3e38, -3e38, -3e38]]), 2, False)
    assert chosen.tolist() == [[1, 2], [0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0], [1 / 3, 1 / 3]]))


@both_dtypes
@pytest.mark.parametrize("weights", ["full", "int8"])
def test_threads_and_formats_change_no_bit(dtype: torch.dtype, weights: Any) -> None:
    """int8 experts are the experts of the rounded matrices; several threads give what one does."""
    own = layer(6, 50, 40, dtype, GatedUnit(), True)
    packed = own.packed(lambda matrix: cpu.OPERATORS["pack_linear"](matrix, weights))
    plain = own.packed(lambda matrix: reference.pack_linear(matrix, weights))
    threaded = ThreadedExperts(3)
    for n in (1, 8, 70, 0, 3):
        x, routing = torch.randn(n, 50).to(dtype), random_routing(n, 6, 2)
        out = cpu.OPERATORS["experts"](x, routing, packed)
        assert torch.equal(threaded(x, routing, packed), out)
        wanted = reference.experts(x, routing, plain)
        assert_rounds_to(out, wanted.float(), 2 * ULPS[dtype], tolerance=2e-5 if dtype == torch.float32 else 2e-2)


def test_a_stack_gives_back_its_matrices() -> None:
    matrices = torch.randn(3, 5, 8)
    for weights in ("full", "int8"):
        packed = [reference.pack_linear(matrix, weights) for matrix in matrices]  # type: ignore[arg-type]
        stacked = stack_weights(packed)
        for index, one in enumerate(packed):
            found = expert_weight(stacked, index)
            assert torch.equal(found.data, one.data)
            assert (found.scale is None) == (one.scale is None)
            assert one.scale is None or torch.equal(found.scale, one.scale)  # type: ignore[arg-type]


OPERANDS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "rank": (lambda a: {"x": a["x"][0]}, "x must be a matrix"),
    "width": (lambda a: {"x": torch.ones(3, 9)}, "do not fit x of 9"),
    "dtype": (lambda a: {"x": a["x"].bfloat16()}, "gate_up must be torch.bfloat16"),
    "strided": (lambda a: {"x": torch.ones(8, 3).T}, "x must be contiguous"),
    "rows": (lambda a: {"routing": random_routing(4, 4, 2)}, "routing.experts must be contiguous"),
    "long": (lambda a: {"routing": a["routing"]._replace(experts=a["routing"].experts.long())}, "torch.int32"),
    "halves": (lambda a: {"shared": a["x"]}, "shared and shared_gate come together"),
    "gate": (lambda a: {"shared": a["x"], "shared_gate": torch.ones(3)}, "shared_gate must be contiguous"),
    "bias": (
        lambda a: {"weights": dataclasses.replace(a["weights"], down_bias=torch.ones(3, 8))},
        "down_bias must be contiguous",
    ),
    "counts": (
        lambda a: {"weights": dataclasses.replace(a["weights"], down=expert_weights(a["weights"].down, 3))},
        "gate_up has 4 experts, down 3",
    ),
    "layout": (
        lambda a: {"weights": dataclasses.replace(a["weights"], gate_up=expert_weight(a["weights"].gate_up, 0))},
        "pack_linear",
    ),
}


def expert_weights(stacked: LinearWeight, count: int) -> LinearWeight:
    return dataclasses.replace(stacked, data=stacked.data[:count])


@pytest.mark.parametrize("case", OPERANDS)
@pytest.mark.parametrize(
    ("experts", "pack"), [pytest.param(*p.values[:2], id=p.id) for p in with_pack() if p.values[2] == DTYPES[0]]
)
def test_wrong_arguments_are_errors(experts: Implementation, pack: Pack, case: str) -> None:
    if experts.function is reference.experts:
        return
    weights = layer(4, 8, 6, torch.float32, GatedUnit(), False).packed(pack)
    given: dict[str, Any] = {"x": torch.ones(3, 8), "routing": random_routing(3, 4, 2), "weights": weights}
    experts(**given)
    change, message = OPERANDS[case]
    with pytest.raises(ValueError, match=f"experts: .*{message}"):
        experts(**{**given, **change(given)})


def test_the_cpu_looks_for_experts_that_are_not_there() -> None:
    weights = layer(4, 8, 6, torch.float32, GatedUnit(), False).packed(cpu.OPERATORS["pack_linear"])
    for wrong in (-1, 4):
        routing = random_routing(3, 4, 2)
        routing.experts[1, 1] = wrong
        with pytest.raises(ValueError, match=rf"experts: an expert is {wrong}, must be in \[0, 4\)"):
            cpu.OPERATORS["experts"](torch.ones(3, 8), routing, weights)


@pytest.mark.parametrize("route", everyone("route"))
def test_a_wrong_number_of_experts_is_refused(route: Implementation) -> None:
    for top_k in (0, 5):
        with pytest.raises(ValueError, match=f"route: top_k must be from 1 to 4, not {top_k}"):
            route(torch.ones(2, 4), top_k, True)

"""pack_linear(weights="int8") and linear with such weights: integers and a scale for each output channel."""

from __future__ import annotations

import pytest
import torch
from ops_support import assert_rounds_to, both_dtypes, strided_rows
from test_linear import MATRICES, Linear, every_provider, inputs, providers
from torch import Tensor

from pearl_kernels import LinearWeight, Situation, reference, select


def exact_product(x: Tensor, weight: LinearWeight, bias: Tensor | None) -> Tensor:
    """In float64, of the reference's integers and scales."""
    assert weight.scale is not None
    out = (x.double() @ weight.data.double().T) * weight.scale.double()
    return (out if bias is None else out + bias.double()).float()


@pytest.mark.parametrize("op", providers(with_reference=True))
@pytest.mark.parametrize("n", [*range(1, 18), 67])
@both_dtypes
def test_the_product_of_the_integers(op: Linear, n: int, dtype: torch.dtype) -> None:
    pack, linear = op
    for m, k in MATRICES:
        x, matrix, bias = inputs(n, m, k, dtype)
        weight = pack(matrix, "int8")
        assert (weight.out_features, weight.in_features) == (m, k)
        for b in (None, bias):
            exact = exact_product(x, reference.pack_linear(matrix, "int8"), b)
            out = linear(x, weight, b)
            assert out.dtype == dtype
            assert_rounds_to(out, exact, tolerance=3e-6 * max(8, k**0.5))
            assert torch.equal(linear(strided_rows(x), weight, b), out)


@every_provider
@both_dtypes
def test_rows_are_independent_to_the_bit(op: Linear, dtype: torch.dtype) -> None:
    pack, linear = op
    for m, k in MATRICES:
        x, matrix, bias = inputs(67, m, k, dtype)
        weight = pack(matrix, "int8")
        out = linear(x, weight, bias)
        for begin, end in ((0, 1), (3, 5), (7, 10), (11, 15), (20, 28), (40, 67)):
            assert torch.equal(linear(x[begin:end], weight, bias), out[begin:end])


@both_dtypes
def test_the_integers_are_the_nearest_multiples_of_the_scale(dtype: torch.dtype) -> None:
    matrix = torch.randn(37, 53).to(dtype)
    matrix[5] = 0
    matrix[6] = 0
    matrix[6, 7] = -3.0
    weight = reference.pack_linear(matrix, "int8")
    assert weight.scale is not None
    assert (weight.data.dtype, weight.scale.dtype) == (torch.int8, torch.float32)
    assert weight.data.abs().amax(1).tolist() == [0 if row == 5 else 127 for row in range(37)]
    assert (weight.data[6, 7], weight.scale[5]) == (-127, 1)
    error = weight.data.float() * weight.scale[:, None] - matrix.float()
    assert (error.abs() <= weight.scale[:, None] * 0.5001).all()


def test_exact_integers_come_back_exactly() -> None:
    """Where every row's largest magnitude is 127 and x is small integers, nothing is rounded anywhere."""
    q = torch.randint(-127, 128, (61, 40))
    q[:, 0] = 127
    x = torch.randint(-4, 5, (9, 40))
    for op in providers(with_reference=True):
        ((pack, linear),) = op.values  # type: ignore[attr-defined]
        assert torch.equal(linear(x.float(), pack(q.float(), "int8")), (x @ q.T).float())
        assert torch.equal(linear(x.bfloat16(), pack(q.bfloat16(), "int8")), (x @ q.T).float().bfloat16())


@pytest.mark.parametrize("op", [p for p in providers() if p.id == "cpu-cpu"])
@both_dtypes
def test_padded_columns_and_scales_are_never_seen(op: Linear, dtype: torch.dtype) -> None:
    pack, linear = op
    x, matrix, _ = inputs(9, 50, 31, dtype)
    weight = pack(matrix, "int8")
    wanted = linear(x, weight)
    weight.data[-1, :, :, 2:] = 99  # 50 columns are two of the second panel
    assert torch.equal(linear(x, weight), wanted)


@pytest.mark.parametrize("op", providers(with_reference=True))
def test_weights_that_are_not_finite_are_refused(op: Linear) -> None:
    pack, _ = op
    for bad in (torch.nan, torch.inf):
        matrix = torch.randn(5, 8)
        matrix[3, 2] = bad
        with pytest.raises(ValueError, match="int8 needs finite weights"):
            pack(matrix, "int8")


def test_a_worker_s_operators_pack_what_its_situation_says() -> None:
    for prefer in ({}, {"linear": "reference"}):
        kernels = select(Situation(weights="int8"), prefer)
        x, matrix, bias = inputs(3, 50, 33, torch.float32)
        weight = kernels.pack_linear(matrix)
        assert weight.data.dtype == torch.int8
        exact = exact_product(x, reference.pack_linear(matrix, "int8"), bias)
        assert_rounds_to(kernels.linear(x, weight, bias), exact, tolerance=3e-5)
        assert select(Situation(), prefer).pack_linear(matrix).data.dtype == torch.float32

"""rms_norm, add_rms_norm, silu_and_mul, gelu_and_mul and scale_and_cap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_support import ULPS, Implementation, assert_rounds_to, each_dtype, emulated, implementations, strided_rows

from pearl_kernels import reference

SHAPES = [(0, 64), (1, 1), (1, 7), (3, 16), (5, 17), (2, 320), (4, 1031)]


def everyone(op: str) -> list[Any]:
    return implementations(op) + emulated(op)


@pytest.mark.parametrize(("rms_norm", "dtype"), each_dtype(everyone("rms_norm")))
@pytest.mark.parametrize(("n", "width"), SHAPES)
def test_rms_norm_matches_reference(rms_norm: Implementation, n: int, width: int, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(n, width) * 4).to(dtype), torch.randn(width).to(dtype)
    exact = reference.rms_norm(x.float(), weight.float(), 1e-5)
    for rows in (x, strided_rows(x)):
        out = rms_norm(rows, weight, 1e-5)
        assert out.is_contiguous()
        assert out.dtype == dtype
        assert_rounds_to(out, exact, ULPS[dtype])


@pytest.mark.parametrize(("add_rms_norm", "dtype"), each_dtype(everyone("add_rms_norm")))
@pytest.mark.parametrize(("n", "width"), SHAPES)
def test_add_rms_norm_matches_reference(add_rms_norm: Implementation, n: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight = ((torch.randn(*shape) * 2).to(dtype) for shape in ((n, width), (n, width), (width,)))
    given, summed = x.clone(), residual.clone()
    reference.add_rms_norm(x, summed, weight, 1e-6)
    exact = reference.rms_norm(summed.float(), weight.float(), 1e-6)
    for rows in (residual.clone(), strided_rows(residual)):
        out = add_rms_norm(strided_rows(x), rows, weight, 1e-6)
        assert torch.equal(rows, summed)  # one addition, rounded once: the same bits
        assert_rounds_to(out, exact, ULPS[dtype])
    assert torch.equal(x, given)


def activations() -> list[Any]:
    """pytest parameters: an implementation, and its reference."""
    ops = {"silu_and_mul": reference.silu_and_mul, "gelu_and_mul": reference.gelu_and_mul}
    return [pytest.param(p.values[0], of, id=f"{p.id}-{op}") for op, of in ops.items() for p in everyone(op)]


@pytest.mark.parametrize(("activation", "expected"), activations())
@pytest.mark.parametrize(("n", "width"), [*SHAPES, (3, 1024)])
@pytest.mark.parametrize("size", [3, 30])
def test_activations_match_their_references(
    activation: Implementation, expected: Implementation, n: int, width: int, size: int
) -> None:
    for dtype in activation.dtypes:
        x = torch.cat((torch.randn(n, width) * size, torch.randn(n, width)), -1).to(dtype)
        exact = expected(x.float())
        for rows in (x, strided_rows(x)):
            assert_rounds_to(activation(rows), exact, ULPS[dtype])


@pytest.mark.parametrize(("activation", "expected"), activations())
def test_activations_saturate(activation: Implementation, expected: Implementation) -> None:
    gates = torch.tensor([[-1e30, -200.0, -88.0, -12.0, 0.0, 88.0, 1e30]])
    x = torch.cat((gates, torch.ones_like(gates)), -1)
    torch.testing.assert_close(activation(x), expected(x), rtol=1e-5, atol=1e-25)


@pytest.mark.parametrize("scale_and_cap", everyone("scale_and_cap"))
@pytest.mark.parametrize(("n", "width"), [*SHAPES, (3, 1030)])
@pytest.mark.parametrize(("scale", "softcap"), [(55.5, 0.0), (1.0, 30.0), (0.125, 0.5)])
def test_scale_and_cap_matches_reference(
    scale_and_cap: Implementation, n: int, width: int, scale: float, softcap: float
) -> None:
    for dtype in scale_and_cap.dtypes:
        x = (torch.randn(n, width) * 40).to(dtype)
        exact = x.float().clone()
        reference.scale_and_cap(exact, scale, softcap)
        for rows in (x.clone(), strided_rows(x)):
            assert scale_and_cap(rows, scale, softcap) is None
            assert_rounds_to(rows, exact, ULPS[dtype])


@pytest.mark.parametrize("scale_and_cap", everyone("scale_and_cap"))
def test_a_cap_keeps_what_is_banned_and_hides_no_nan(scale_and_cap: Implementation) -> None:
    x = torch.tensor([[-torch.inf, -1e30, 0.0, 1e30, torch.inf, torch.nan]])
    scale_and_cap(x, 0.5, 30.0)
    assert x[0, :5].tolist() == [-torch.inf, -30.0, 0.0, 30.0, 30.0]
    assert x[0, 5].isnan()


@pytest.mark.parametrize("op", everyone("rms_norm"))
def test_nan_is_not_hidden(op: Implementation) -> None:
    x = torch.randn(2, 33)
    x[1, 30] = torch.nan
    out = op(x, torch.ones(33), 1e-6)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("activation", [*everyone("silu_and_mul"), *everyone("gelu_and_mul")])
@pytest.mark.parametrize("column", [3, 33 + 3], ids=["gate", "up"])
def test_activations_do_not_hide_nan(activation: Implementation, column: int) -> None:
    x = torch.randn(2, 66)
    x[1, column] = torch.nan
    assert activation(x).isnan().nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("op", everyone("rms_norm"))
def test_bf16_rounds_to_nearest_even(op: Implementation) -> None:
    """Weights carry every bit pattern through a scale of exactly one, up to values whose square overflows nothing."""
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    weight = torch.arange(0x3000, 0x4000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(op(ones, weight, 0.0)[0], weight)


@pytest.mark.parametrize("rms_norm", everyone("rms_norm"))
def test_a_row_does_not_depend_on_its_batch(rms_norm: Implementation) -> None:
    x, weight = torch.randn(4, 77).bfloat16(), torch.randn(77).bfloat16()
    together = rms_norm(x, weight, 1e-6)
    for row in range(4):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], together[row])


def test_reference_norm_is_the_plain_formula() -> None:
    x, weight = torch.randn(5, 40, dtype=torch.float32), torch.randn(40)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (40,), weight, 1e-5))
    residual = torch.randn(5, 40)
    expected = residual + x
    out = reference.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, expected)
    torch.testing.assert_close(out, F.rms_norm(expected, (40,), weight, 1e-5))


def test_reference_activation_is_the_plain_formula() -> None:
    x = torch.randn(3, 10)
    gate, up = x[:, :5], x[:, 5:]
    torch.testing.assert_close(reference.silu_and_mul(x), gate * torch.sigmoid(gate) * up)
    gelu = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    torch.testing.assert_close(reference.gelu_and_mul(x), gelu * up)


def test_reference_cap_is_the_plain_formula() -> None:
    x = torch.randn(3, 10)
    scaled, capped = x.clone(), x.clone()
    reference.scale_and_cap(scaled, 3.0)
    torch.testing.assert_close(scaled, 3 * x)
    reference.scale_and_cap(capped, 3.0, 0.5)
    torch.testing.assert_close(capped, 0.5 * torch.tanh(6 * x))


def test_reference_linear_is_a_matrix_product() -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5)
    torch.testing.assert_close(reference.linear(x, weight), x @ weight.T)
    torch.testing.assert_close(reference.linear(x, weight, bias), x @ weight.T + bias)

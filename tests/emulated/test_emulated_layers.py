"""rms_norm, add_rms_norm and silu_and_mul of the GPU providers, on CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops_support import Implementation, assert_rounds_to, emulated, strided_rows

from pearl_kernels import cpu, reference
from pearl_kernels.triton import norm

SHAPES = [(0, 64), (1, 1), (1, 7), (3, 17), (2, 320), (2, 1031)]
ULPS = {torch.float32: 0.0, torch.bfloat16: 0.5, torch.float16: 0.5 / 8}  # in bf16's units

every_dtype = pytest.mark.parametrize("dtype", ULPS, ids=("fp32", "bf16", "fp16"))
# An exponential that overflows is meant to; numpy, which the interpreter computes with, warns.
overflows = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize("rms_norm", emulated("rms_norm"))
@pytest.mark.parametrize(("n", "width"), SHAPES)
@every_dtype
def test_rms_norm_matches_reference(rms_norm: Implementation, n: int, width: int, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(n, width) * 4).to(dtype), torch.randn(width).to(dtype)
    exact = reference.rms_norm(x.float(), weight.float(), 1e-5)
    for rows in (x, strided_rows(x)):
        out = rms_norm(rows, weight, 1e-5)
        assert out.is_contiguous()
        assert out.dtype == dtype
        assert_rounds_to(out, exact, ULPS[dtype])


@pytest.mark.parametrize("add_rms_norm", emulated("add_rms_norm"))
@pytest.mark.parametrize(("n", "width"), SHAPES)
@every_dtype
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


@pytest.mark.parametrize("silu_and_mul", emulated("silu_and_mul"))
@pytest.mark.parametrize(("n", "width"), [*SHAPES, (3, 1024)])
@every_dtype
@overflows
def test_silu_and_mul_matches_reference(silu_and_mul: Implementation, n: int, width: int, dtype: torch.dtype) -> None:
    x = (torch.randn(n, 2 * width) * 30).to(dtype)
    exact = reference.silu_and_mul(x.float())
    for rows in (x, strided_rows(x)):
        assert_rounds_to(silu_and_mul(rows), exact, ULPS[dtype])


@pytest.mark.parametrize("silu_and_mul", emulated("silu_and_mul"))
@overflows
def test_silu_saturates(silu_and_mul: Implementation) -> None:
    gates = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 1e30]])
    out = silu_and_mul(torch.cat((gates, torch.ones_like(gates)), -1))
    torch.testing.assert_close(out, F.silu(gates), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("op", emulated("rms_norm"))
def test_nan_is_not_hidden(op: Implementation) -> None:
    x = torch.randn(2, 33)
    x[1, 30] = torch.nan
    out = op(x, torch.ones(33), 1e-6)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("silu_and_mul", emulated("silu_and_mul"))
@pytest.mark.parametrize("column", [3, 33 + 3], ids=["gate", "up"])
def test_silu_does_not_hide_nan(silu_and_mul: Implementation, column: int) -> None:
    x = torch.randn(2, 66)
    x[1, column] = torch.nan
    assert silu_and_mul(x).isnan().nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("op", emulated("rms_norm"))
def test_bf16_rounds_to_nearest_even(op: Implementation) -> None:
    """Weights carry every bit pattern through a scale of exactly one, up to values whose square overflows nothing."""
    ones = torch.ones(1, 4096, dtype=torch.bfloat16)
    weight = torch.arange(0x3000, 0x4000, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert torch.equal(op(ones, weight, 0.0)[0], weight)


@pytest.mark.parametrize("add_rms_norm", emulated("add_rms_norm"))
def test_a_wide_row(add_rms_norm: Implementation) -> None:
    x, residual, weight = torch.randn(1, 9001).half(), torch.randn(1, 9001).half(), torch.randn(9001).half()
    summed = residual.clone()
    reference.add_rms_norm(x, summed, weight, 1e-5)
    out = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, summed)
    assert_rounds_to(out, reference.rms_norm(summed.float(), weight.float(), 1e-5), ULPS[torch.float16])


@pytest.mark.parametrize("rms_norm", emulated("rms_norm"))
def test_a_row_does_not_depend_on_its_batch(rms_norm: Implementation) -> None:
    x, weight = torch.randn(4, 77).bfloat16(), torch.randn(77).bfloat16()
    together = rms_norm(x, weight, 1e-6)
    for row in range(4):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-6)[0], together[row])


BAD_CALLS: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "rank": ("rms_norm", lambda: (torch.ones(4), torch.ones(4), 1e-6)),
    "width": ("rms_norm", lambda: (torch.ones(2, 4), torch.ones(5), 1e-6)),
    "weight-dtype": ("rms_norm", lambda: (torch.ones(2, 4), torch.ones(4).bfloat16(), 1e-6)),
    "columns-apart": ("rms_norm", lambda: (torch.ones(4, 2).T, torch.ones(4), 1e-6)),
    "residual-rows": ("add_rms_norm", lambda: (torch.ones(2, 4), torch.ones(3, 4), torch.ones(4), 1e-6)),
    "odd": ("silu_and_mul", lambda: (torch.ones(2, 7),)),
    "activation-rank": ("silu_and_mul", lambda: (torch.ones(2, 4, 4),)),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_arguments_are_refused_in_the_words_of_the_cpu_provider(case: str) -> None:
    op, arguments = BAD_CALLS[case]
    with pytest.raises(ValueError, match=op) as expected:
        cpu.OPERATORS[op](*arguments())
    for provider in emulated(op):
        with pytest.raises(ValueError, match=op) as refused:
            provider.values[0](*arguments())
        assert str(refused.value) == str(expected.value)


def test_other_dtypes_are_refused() -> None:
    for provider in emulated("rms_norm"):
        with pytest.raises(ValueError, match=r"rms_norm: x must be float32 or bfloat16 or float16, not torch\.float64"):
            provider.values[0](torch.ones(1, 4).double(), torch.ones(4).double(), 1e-6)


def test_the_widest_row_of_triton_is_told() -> None:
    with pytest.raises(ValueError, match=r"rms_norm: x must be at most 32768 wide, not 32776"):
        norm.rms_norm(torch.ones(1, 32776), torch.ones(32776), 1e-6)

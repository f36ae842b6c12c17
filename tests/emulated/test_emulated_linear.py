"""Weight-only linear of Triton: few rows, and many, of every kind of numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_support import interpreted, interpreter_bf16, strided_rows

from pearl_kernels import QuantizedMatrix, reference
from pearl_kernels.reference import dequantize
from pearl_kernels.triton.linear import FEW_ROWS, linear, pack_linear, pack_quantized, weight_rows

pytestmark = interpreted
KINDS = ("int4", "int4+", "int8", "int8+", "fp8")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (outputs, inputs, group): below and above a block of outputs, a last group that is not whole, odd inputs, all inputs.
SHAPES = [(5, 32, 32), (40, 130, 64), (33, 160, 96), (32, 77, 77)]


@pytest.fixture(autouse=True)
def bf16() -> None:
    interpreter_bf16.install()


def matrix_of(kind: str, m: int, k: int, group: int) -> QuantizedMatrix:
    bits, groups = 4 if "4" in kind else 8, -(-k // group)
    values = torch.randint(-(1 << bits - 1), 1 << bits - 1, (m, k), dtype=torch.int8)
    scale = torch.rand(m, groups) + 0.01
    if kind == "fp8":
        values, scale = torch.randn(m, k).mul(30).to(torch.float8_e4m3fn), scale / 30
    return QuantizedMatrix(values, scale, torch.randn(m, groups) if "+" in kind else None, group, bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_of_the_numbers_that_are_meant(kind: str, dtype: torch.dtype) -> None:
    for m, k, group in SHAPES:
        matrix = matrix_of(kind, m, k, group)
        weight = pack_quantized(matrix, dtype)
        numbers, bias = dequantize(matrix).double(), torch.randn(m).to(dtype)
        for n in (2, 17, FEW_ROWS + 1) if m == 40 else (3, FEW_ROWS + 1):
            x = torch.randn(n, k).to(dtype)
            exact, out = F.linear(x.double(), numbers, bias.double()), linear(x, weight, bias)
            if n <= FEW_ROWS:
                assert torch.equal(linear(strided_rows(x), weight, bias), out)
            assert out.dtype == dtype
            unit = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
            size = x.double().abs() @ numbers.abs().T
            # The result is rounded once, bias and all. Decoded for many rows: so are weights, and the product.
            rounding = exact.abs() * unit + (0.0 if n <= FEW_ROWS else size * unit * 2)
            assert ((out.double() - exact).abs() <= rounding + 4e-6 * size + 1e-5).all()
            if 1 < n <= FEW_ROWS:
                assert torch.equal(linear(x[n - 1 :], weight, bias)[0], out[n - 1])
                assert torch.equal(linear(x[: n - 1], weight, bias), out[: n - 1])


def test_every_fp8_number_is_read_exactly() -> None:
    """NaN and subnormal numbers too; each as a weight of its own."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(8, 32)
    matrix = QuantizedMatrix(values, torch.ones(8, 1), None, 32, 8)
    weight = pack_quantized(matrix, torch.float32)
    many = linear(torch.eye(32).repeat(3, 1), weight)[:32].T
    finite = torch.where(values.float().isnan(), 0.0, values.float()).to(torch.float8_e4m3fn)
    few = linear(torch.eye(32), pack_quantized(QuantizedMatrix(finite, torch.ones(8, 1), None, 32, 8), torch.float32)).T
    assert torch.equal(few, finite.float())
    # A NaN spoils its output's products with every row, so that many rows show the others' alone.
    spoilt = values.float().isnan().any(1)
    assert torch.equal(many[~spoilt], values.float()[~spoilt])
    assert many[spoilt].isnan().all()


def test_four_bits_are_kept_in_four() -> None:
    for kind, bits in (("int4", 4), ("int8+", 8), ("fp8", 8)):
        weight = pack_quantized(matrix_of(kind, 40, 128, 64), torch.float16)
        assert weight.data.nbytes == 40 * 128 * bits // 8


def test_groups_without_a_kernel_are_decoded_and_plain_weights_are_torch_s() -> None:
    matrix, x = matrix_of("int4+", 10, 40, 20), torch.randn(3, 40)
    weight = pack_quantized(matrix, torch.float32)
    assert weight.scale is None
    assert torch.equal(linear(x, weight), reference.linear(x, dequantize(matrix)))
    assert torch.equal(weight_rows(weight, torch.tensor([3])), dequantize(matrix)[3:4])
    rounded = pack_linear(dequantize(matrix), "int8")
    assert torch.equal(linear(x, rounded), reference.linear(x, rounded))


def test_wrong_arguments_are_errors() -> None:
    weight, x = pack_quantized(matrix_of("int4", 10, 64, 32), torch.float32), torch.randn(2, 64)
    for arguments, message in [
        ((x[:, :63], weight), r"x must be torch.float32 \[2, 64\]"),
        ((x.double(), weight), "float32 or bfloat16 or float16"),
        ((x[0], weight), "must be a matrix"),
        ((x, weight, torch.ones(9)), r"bias must be contiguous torch.float32 \[10\]"),
        ((x, weight, torch.ones(10).half()), "bias must be contiguous torch.float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear(*arguments)


def test_no_rows() -> None:
    weight = pack_quantized(matrix_of("int4", 10, 64, 32), torch.float32)
    assert linear(torch.empty(0, 64), weight).shape == (0, 10)

"""pack_quantized and linear with such weights: a scale, and maybe an offset, for each group of inputs."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from ops_support import assert_rounds_to, both_dtypes, strided_rows

from pearl_kernels import LinearWeight, QuantizedMatrix, Situation, reference, select
from pearl_kernels.cpu import _core
from pearl_kernels.cpu.linear import ThreadedLinear, linear, pack_linear, pack_quantized, weight_format, weight_rows
from pearl_kernels.reference import dequantize, stack_outputs

Bits = Literal[4, 8]
# (outputs, inputs, group): below and above a panel, odd inputs, a last group that is not whole, one group for all,
# groups longer than a chunk of inputs.
SHAPES = [
    (1, 8, 8),
    (7, 5, 5),
    (48, 64, 32),
    (49, 100, 32),
    (50, 640, 128),
    (97, 1031, 64),
    (33, 776, 776),
    (5, 992, 248),
]
FORMATS = [(4, False), (4, True), (8, False), (8, True)]
every_format = pytest.mark.parametrize(("bits", "offsets"), FORMATS, ids=["int4", "int4+", "int8", "int8+"])


def matrix_of(m: int, k: int, group: int, bits: Bits, offsets: bool) -> QuantizedMatrix:
    low = -(1 << bits - 1)
    groups = -(-k // group)
    offset = torch.randn(m, groups) if offsets else None
    return QuantizedMatrix(
        torch.randint(low, -low, (m, k), dtype=torch.int8), torch.rand(m, groups) + 0.01, offset, group, bits
    )


def packed(matrix: QuantizedMatrix, dtype: torch.dtype) -> LinearWeight:
    weight = pack_quantized(matrix, dtype)
    assert weight_format(weight) == (2 if matrix.bits == 4 else 3)
    return weight


@every_format
@pytest.mark.parametrize("n", [*range(1, 18), 67])
@both_dtypes
def test_the_product_of_the_numbers_that_are_meant_core(n: int, bits: Bits, offsets: bool, dtype: torch.dtype) -> None:
    for m, k, group in SHAPES:
        matrix = matrix_of(m, k, group, bits, offsets)
        x, bias = torch.randn(n, k).to(dtype), torch.randn(m).to(dtype)
        numbers = dequantize(matrix).double()
        size = x.double().abs() @ numbers.abs().T  # of the terms, which may cancel
        ours = packed(matrix, dtype), linear
        reference_s = reference.pack_quantized(matrix, dtype), reference.linear
        for b in (None, bias):
            exact = F.linear(x.double(), numbers, None if b is None else b.double())
            for weight, op in (ours, reference_s) if n == 3 else (ours,):
                assert (weight.out_features, weight.in_features) == (m, k)
                out = op(x, weight, b)
                assert out.dtype == dtype
                rounding = exact.abs() * (2.0**-8 if dtype == torch.bfloat16 else 0.0)
                # Terms of the integers with their offset apart are up to twice as large as those of the numbers.
                assert ((out.double() - exact).abs() <= rounding + 4e-6 * size + 1e-5).all()
        weight, _ = ours
        whole = linear(x, weight, bias)
        assert torch.equal(linear(strided_rows(x), weight, bias), whole)
        for row in range(0, n, 5):
            assert torch.equal(linear(x[row : row + 1], weight, bias)[0], whole[row])


@every_format
@both_dtypes
def test_exact_numbers_come_back_exactly_core(bits: Bits, offsets: bool, dtype: torch.dtype) -> None:
    """Every integer at every place of a step, powers of two as scales: nothing is rounded anywhere."""
    low = -(1 << bits - 1)
    values = torch.arange(96 * 64).view(96, 64) * 37 % (1 << bits) + low
    values[:, :16] = (torch.arange(16) + torch.arange(96)[:, None]) % (1 << bits) + low
    scale = 2.0 ** torch.randint(-3, 3, (96, 2))
    offset = torch.randint(-8, 8, (96, 2)).float() if offsets else None
    matrix = QuantizedMatrix(values.to(torch.int8), scale, offset, 32, bits)
    x = torch.eye(64, dtype=dtype)
    assert torch.equal(linear(x, packed(matrix, dtype)), dequantize(matrix).T.to(dtype))


@every_format
@both_dtypes
def test_rows_and_threads_change_no_bit_core(bits: Bits, offsets: bool, dtype: torch.dtype) -> None:
    threaded = ThreadedLinear(3)
    for m, k, group in SHAPES:
        weight = packed(matrix_of(m, k, group, bits, offsets), dtype)
        x, bias = torch.randn(67, k).to(dtype), torch.randn(m).to(dtype)
        out = linear(x, weight, bias)
        for begin, end in ((0, 1), (3, 5), (7, 10), (11, 15), (20, 28), (40, 67)):
            assert torch.equal(linear(x[begin:end], weight, bias), out[begin:end])
        assert torch.equal(threaded(x, weight, bias), out)


@every_format
@both_dtypes
def test_nan_stays_in_its_row_core(bits: Bits, offsets: bool, dtype: torch.dtype) -> None:
    weight = packed(matrix_of(70, 65, 32, bits, offsets), dtype)
    x = torch.randn(11, 65).to(dtype)
    x[3, 64], x[8, 0] = torch.nan, torch.inf
    out = linear(x, weight)
    assert out[3].isnan().all()
    assert out[[row for row in range(11) if row not in (3, 8)]].isfinite().all()


@both_dtypes
def test_the_core_reads_no_padding_and_writes_only_the_output(dtype: torch.dtype) -> None:
    for bits, offsets in FORMATS:
        weight = packed(matrix_of(50, 72, 32, bits, offsets), dtype)  # type: ignore[arg-type]
        x = torch.randn(9, 72).to(dtype)
        wanted = linear(x, weight)
        weight.scale[-1, :, 2:] = torch.nan  # type: ignore[index]  # 50 columns are two of the second panel
        guarded = torch.full((11, 50), 7.0, dtype=dtype)
        address = 0 if weight.offset is None else weight.offset.data_ptr()
        _core.LinearThreads(1).linear(
            int(dtype == torch.bfloat16), weight_format(weight), 9, 72, 50, x.data_ptr(), 72, weight.data.data_ptr(),
            weight.scale.data_ptr(), address, 32, 0, guarded[1].data_ptr(),  # type: ignore[union-attr]
        )  # fmt: skip
        assert (guarded[[0, -1]] == 7).all()
        assert torch.equal(guarded[1:-1], wanted)


@both_dtypes
def test_what_is_held_has_as_many_bits_as_it_says_core(dtype: torch.dtype) -> None:
    for bits in (4, 8):
        weight = packed(matrix_of(96, 256, 64, bits, True), dtype)  # type: ignore[arg-type]
        assert weight.data.nbytes == 96 * 256 * bits // 8
        assert weight.scale is not None
        assert weight.offset is not None
        assert weight.scale.nbytes == weight.offset.nbytes == 96 * 4 * 4


@both_dtypes
def test_what_has_no_kernel_is_decoded_core(dtype: torch.dtype) -> None:
    """fp8, and groups that end within a step."""
    eight_bits = (torch.randn(50, 40) * 100).to(torch.float8_e4m3fn)
    cases = [
        QuantizedMatrix(eight_bits, torch.rand(50, 2), None, 32, 8),
        matrix_of(50, 40, 20, 4, True),
        matrix_of(50, 39, 13, 8, False),
    ]
    x = torch.randn(3, 40).to(dtype)
    for matrix in cases:
        weight = pack_quantized(matrix, dtype)
        k = matrix.values.shape[1]
        assert weight_format(weight) == 0
        assert torch.equal(linear(x[:, :k], weight), linear(x[:, :k], pack_linear(dequantize(matrix).to(dtype))))


def test_a_description_that_contradicts_itself_is_an_error() -> None:
    values, scale = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 2)
    QuantizedMatrix(values, scale, None, 32, 4)
    for arguments, message in [
        ((values[0], scale, None, 32, 4), r"shape \[64\]"),
        ((values, scale, None, 0, 4), "groups of 0"),
        ((values, scale, None, 64, 4), r"scale must be torch.float32 \[4, 1\]"),
        ((values, scale.bfloat16(), None, 32, 8), "scale must be torch.float32"),
        ((values, scale, scale[:3], 32, 8), r"offset must be torch.float32 \[4, 2\]"),
        ((values.to(torch.float8_e4m3fn), scale, None, 32, 4), "values of 4 bits must be torch.int8"),
        ((values.int(), scale, None, 32, 8), "values of 8 bits must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            QuantizedMatrix(*arguments)


def test_a_quantised_matrix_gives_no_rows() -> None:
    matrix = matrix_of(48, 64, 32, 4, False)
    for pack, rows in ((pack_quantized, weight_rows), (reference.pack_quantized, reference.weight_rows)):
        with pytest.raises(ValueError, match="quantised"):
            rows(pack(matrix, torch.float32), torch.tensor([1]))


def test_every_worker_can_pack_one() -> None:
    matrix = matrix_of(48, 64, 32, 4, True)
    x = torch.randn(3, 64)
    for prefer in ({}, {"linear": "reference"}):
        kernels = select(Situation(), prefer)
        exact = (x.double() @ dequantize(matrix).double().T).float()
        assert_rounds_to(kernels.linear(x, kernels.pack_quantized(matrix, torch.float32)), exact, tolerance=1e-4)


def test_matrices_that_are_not_alike_are_not_one() -> None:
    first = matrix_of(8, 64, 32, 4, False)
    assert stack_outputs([first, matrix_of(5, 64, 32, 4, True)]).values.shape == (13, 64)
    for other in (matrix_of(8, 64, 16, 4, False), matrix_of(8, 64, 32, 8, False), matrix_of(8, 32, 32, 4, False)):
        with pytest.raises(ValueError, match="matrices of other inputs, groups or numbers cannot be one"):
            stack_outputs([first, other])

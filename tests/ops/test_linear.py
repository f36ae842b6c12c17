"""pack_linear and linear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ops_support import assert_rounds_to, both_dtypes, strided_rows
from torch import Tensor

from pearl_kernels import LinearWeight, Situation, reference, select
from pearl_kernels.cpu import _core
from pearl_kernels.cpu.linear import pack_linear as cpu_pack
from pearl_kernels.registry import PROVIDERS

BY_TORCH = ("reference", "triton")  # plain matrices are torch's product there, whose rows may depend on each other
Linear = tuple[Callable[[Tensor], LinearWeight], Callable[..., Tensor]]
HERE = Path(__file__).parent
ROWS = [*range(18), 34, 50, 64, 65, 131]
# Odd, below and above a panel, a single column, more than one chunk of inputs.
MATRICES = [(1, 1), (7, 5), (48, 64), (49, 33), (95, 1031), (50, 193), (384, 384), (130, 2050)]  # outputs, inputs


def providers(with_reference: bool = False) -> list[object]:
    return [
        pytest.param((p.operators["pack_linear"], p.operators["linear"]), id=f"{p.name}-cpu")
        for p in PROVIDERS
        if "linear" in p.operators
        and p.refuses("linear", Situation()) is None
        and (with_reference or p.name not in BY_TORCH)
    ]


every_provider = pytest.mark.parametrize("op", providers())


def inputs(n: int, m: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(n, k).to(dtype), torch.randn(m, k).to(dtype), torch.randn(m).to(dtype)


@every_provider
@pytest.mark.parametrize("n", ROWS)
@both_dtypes
def test_linear_is_the_product_and_its_rows_are_independent(op: Linear, n: int, dtype: torch.dtype) -> None:
    pack, linear = op
    for m, k in MATRICES:
        x, matrix, bias = inputs(n, m, k, dtype)
        weight = pack(matrix)
        assert (weight.out_features, weight.in_features) == (m, k)
        for b in (None, bias):
            exact = F.linear(x.double(), matrix.double(), None if b is None else b.double())
            out = linear(x, weight, b)
            assert out.dtype == dtype
            assert out.is_contiguous()
            # Products of large terms may cancel: the tolerance is that of a sum of k of them.
            assert_rounds_to(out, exact.float(), tolerance=3e-6 * max(8, k**0.5))
            assert torch.equal(linear(strided_rows(x), weight, b), out)
            for row in range(0, n, 5):
                assert torch.equal(linear(x[row : row + 1], weight, b)[0], out[row])


@every_provider
@pytest.mark.parametrize(("m", "k"), [(640, 384), (384, 1152), (64, 1031), (50, 4097)])
@both_dtypes
def test_error_is_no_more_than_twice_that_of_torch(op: Linear, m: int, k: int, dtype: torch.dtype) -> None:
    pack, linear = op
    for n in (1, 4, 17):
        x, matrix, bias = inputs(max(n, 16), m, k, dtype)  # of one row alone the ratio is a matter of luck
        weight, parts = pack(matrix), x.split(n)
        exact = F.linear(x.double(), matrix.double(), bias.double())
        ours = torch.cat([linear(part, weight, bias) for part in parts]).double() - exact
        theirs = torch.cat([F.linear(part, matrix, bias) for part in parts]).double() - exact
        assert ours.square().mean() <= 4 * theirs.square().mean()


@every_provider
@both_dtypes
def test_nan_stays_in_its_row(op: Linear, dtype: torch.dtype) -> None:
    pack, linear = op
    for k in (64, 65):
        x, matrix, _ = inputs(11, 70, k, dtype)
        x[3, k - 1] = torch.nan
        x[8, 0] = torch.inf
        out = linear(x, pack(matrix))
        assert out[3].isnan().all()
        assert not out[8].isfinite().any()
        others = [row for row in range(11) if row not in (3, 8)]
        assert out[others].isfinite().all()


@every_provider
@both_dtypes
def test_a_strided_matrix_can_be_packed(op: Linear, dtype: torch.dtype) -> None:
    pack, linear = op
    x, matrix, _ = inputs(3, 50, 40, dtype)
    assert torch.equal(linear(x, pack(matrix.t().contiguous().t())), linear(x, pack(matrix)))


@pytest.mark.parametrize("op", [p for p in providers() if p.id == "cpu-cpu"])
@both_dtypes
def test_padded_columns_are_never_seen(op: Linear, dtype: torch.dtype) -> None:
    pack, linear = op
    x, matrix, _ = inputs(9, 50, 31, dtype)
    weight = pack(matrix)
    wanted = linear(x, weight)
    weight.data[-1, :, 2:] = torch.nan  # 50 columns are two of the second panel
    assert torch.equal(linear(x, weight), wanted)


@both_dtypes
def test_the_core_writes_only_the_output(dtype: torch.dtype) -> None:
    for n, m, k in ((1, 50, 31), (9, 95, 17), (65, 1, 2)):
        x, matrix, _ = inputs(n, m, k, dtype)
        weight = cpu_pack(matrix).data
        guarded = torch.full((n + 2, m), 7.0, dtype=dtype)
        code = int(dtype == torch.bfloat16)
        threads = _core.LinearThreads(1)
        threads.linear(code, 0, n, k, m, x.data_ptr(), k, weight.data_ptr(), 0, 0, 0, 0, guarded[1].data_ptr())
        assert (guarded[[0, -1]] == 7).all()
        assert_rounds_to(guarded[1:-1], (x.double() @ matrix.double().T).float())


@pytest.mark.parametrize("op", [p for p in providers() if p.id == "cpu-cpu"])
def test_wrong_arguments_are_errors(op: Linear) -> None:
    pack, linear = op
    x, matrix, bias = inputs(2, 5, 8, torch.float32)
    weight = pack(matrix)
    cases = [
        ((x[0], weight), "must be a matrix"),
        ((x[:, :7], weight), r"x must be torch.float32 \[2, 8\]"),
        ((x.bfloat16(), weight), r"x must be torch.float32"),
        ((x.t().contiguous().t(), weight), "each row of x must be contiguous"),
        ((x, weight, bias[:4]), r"bias must be contiguous torch.float32 \[5\]"),
        ((x, weight, bias.bfloat16()), "bias must be contiguous torch.float32"),
        ((x, reference.pack_linear(matrix)), "pack_linear"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            linear(*arguments)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        pack(matrix.half())
    with pytest.raises(ValueError, match="must be a matrix"):
        pack(bias)


def test_the_reference_keeps_the_matrix_and_takes_it_plain() -> None:
    x, matrix, bias = inputs(3, 5, 8, torch.float32)
    weight = reference.pack_linear(matrix)
    assert weight.data is matrix
    assert torch.equal(reference.linear(x, weight, bias), reference.linear(x, matrix, bias))


def test_a_weight_is_packed_by_the_provider_that_reads_it() -> None:
    trio = reference.pack_linear, reference.linear, reference.weight_rows
    for op in ("linear", "pack_linear", "weight_rows"):
        pinned = select(prefer={op: "reference"})
        assert (pinned.pack_linear, pinned.linear, pinned.weight_rows) == trio


@pytest.mark.parametrize(
    "op",
    [
        pytest.param((p.operators["pack_linear"], p.operators["weight_rows"]), id=p.name)
        for p in PROVIDERS
        if "weight_rows" in p.operators and p.refuses("weight_rows", Situation()) is None
    ],
)
@both_dtypes
def test_rows_of_a_packed_weight_are_those_of_the_matrix(op: Linear, dtype: torch.dtype) -> None:
    pack, weight_rows = op
    for m, k in MATRICES:
        matrix = torch.randn(m, k).to(dtype)
        rows = torch.cat([torch.tensor([0, m - 1, m - 1]), torch.randint(m, (9,))])
        read = weight_rows(pack(matrix), rows)
        assert torch.equal(read, matrix[rows])
        assert read.is_contiguous()
        assert weight_rows(pack(matrix), rows[:0]).shape == (0, k)
    with pytest.raises(ValueError, match="quantised"):
        weight_rows(pack(matrix, weights="int8"), rows)

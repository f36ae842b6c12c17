"""The shim that runs CUDA sources on the CPU: each thing that it emulates, against a plain formula."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from fractions import Fraction
from itertools import product
from math import frexp, trunc

import pytest
import torch
from cuda_emu import build
from torch import Tensor

pytestmark = build.on_linux

SOURCE = build.SHIM / "primitives.cu"
INVALID_VALUE, INVALID_CONFIGURATION = 1, 9  # cudaError_t


def run(name: str, *arguments: Tensor | int) -> int:
    """Calls an exported function of primitives.cu; the error that it returns."""
    function = getattr(build.library(SOURCE), f"run_{name}")
    return function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments))


@pytest.fixture(params=["ascending", "descending"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PEARL_EMU_ORDER", request.param)
    return str(request.param)


@pytest.mark.parametrize("width", [1, 4, 32])
@pytest.mark.parametrize("argument", [0, 1, 3, 17, 31])
def test_shuffles(width: int, argument: int, order: str) -> None:
    threads = 64
    values, out = torch.rand(threads), torch.full((4, threads), torch.nan)
    assert run("shuffles", values, out, threads, argument, width) == 0
    for t in range(threads):
        warp, lane = t // 32 * 32, t % 32
        first = lane // width * width
        last = first + width - 1
        sources = (
            first + argument % width,
            lane - argument if lane - argument >= first else lane,
            lane + argument if lane + argument <= last else lane,
            lane ^ argument if lane ^ argument <= last else lane,
        )
        assert out[:, t].tolist() == [values[warp + source].item() for source in sources], f"lane {t}"


def test_a_shuffle_from_a_lane_that_does_not_exist_gives_nan() -> None:
    values, out = torch.rand(40), torch.zeros(4, 40)
    assert run("shuffles", values, out, 40, 16, 32) == 0
    assert torch.isnan(out[0, 32:]).all()
    assert torch.equal(out[0, :32], values[16].expand(32))


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x80000001, 0x12345678])
def test_votes_and_reductions_among_the_lanes_of_a_mask(mask: int, order: str) -> None:
    torch.manual_seed(mask)
    values = torch.randint(-3, 4, (32,), dtype=torch.int32)
    out = torch.full((9, 32), -7, dtype=torch.int32)
    assert run("votes", values, out, 32, mask) == 0
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    taken = [int(values[lane]) for lane in lanes]
    bits = [value & 0xFFFFFFFF for value in taken]
    every, either = 0xFFFFFFFF, 0
    for value in bits:
        every, either = every & value, either | value
    for lane in range(32):
        got = [value & 0xFFFFFFFF for value in out[:, lane].tolist()]
        if lane not in lanes:
            assert got[0] == ~mask & 0xFFFFFFFF
            continue
        alike = sum(1 << other for other in lanes if values[other] == values[lane])
        expected = [
            sum(1 << other for other in lanes if values[other] > 0),
            int(max(taken) > 0),
            int(min(taken) > 0),
            *(value & 0xFFFFFFFF for value in (sum(taken), max(taken), min(taken))),
            either,
            every,
            alike,
        ]
        assert got == expected, f"lane {lane}"


@pytest.mark.parametrize("ones", [0, 1, 69, 70])
def test_votes_of_a_block(ones: int, order: str) -> None:
    votes = (torch.arange(70) < ones).int()
    out = torch.full((3,), -1, dtype=torch.int32)
    assert run("block_votes", votes, out, 70) == 0
    assert out.tolist() == [int(ones > 0), int(ones == 70), ones]


def test_shared_memory_belongs_to_one_block(order: str) -> None:
    values = torch.randint(-100, 100, (3, 45), dtype=torch.int32)
    out = torch.zeros(3, 2, dtype=torch.int32)
    assert run("shared_sums", values, out, 3, 45, 45 * 4) == 0
    assert out.tolist() == [[int(row.sum())] * 2 for row in values]


def test_shared_memory_is_poison_before_it_is_written() -> None:
    out = torch.zeros(2, dtype=torch.int32)
    assert run("uninitialised", out) == 0  # two blocks: the first leaves zeros
    assert out.tolist() == [-1, -1]


def test_atomics(order: str) -> None:
    torch.manual_seed(0)
    values = torch.randint(1, 2**40, (120,))
    state = torch.tensor([0, 0, -1, 0, 3, 0])  # unsigned: -1 is the largest
    total, counter = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    assert run("atomics", values, state, total, counter) == 0
    either = 0
    for value in values.tolist():
        either |= value
    first = values[0] if order == "ascending" else values[-1]
    assert state.tolist() == [int(values.sum()), int(values.max()), int(values.min()), either, 7, int(first)]
    assert total.item() == pytest.approx(float(values.sum()), rel=1e-5)
    assert counter.item() == 120 % 5


@pytest.mark.parametrize(("when", "early"), [("late", False), ("early", True)])
def test_asynchronous_copies_arrive_when_waited_for(
    when: str, early: bool, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEARL_EMU_ASYNC", when)
    threads, live = 12, 5
    source = torch.randint(0, 2**15, (2 * threads, 8), dtype=torch.int16)
    first, both = torch.zeros_like(source), torch.zeros_like(source)
    assert run("async_copies", source, first, both, threads, live) == 0
    expected = source.clone()
    expected[threads + live :] = 0
    assert torch.equal(both, expected)
    unfinished = expected[threads:] if early else torch.full_like(first[threads:], -1)
    assert torch.equal(first, torch.cat((source[:threads], unfinished)))


def sum_of_products(c: float, a: list[float], b: list[float]) -> float:
    """c and eight products, aligned to the largest exponent with 24 bits behind it; all that is cut off is lost."""
    exponents = [frexp(x)[1] + frexp(y)[1] - 2 for x, y in zip(a, b, strict=True) if x * y] + [frexp(c)[1] - 1] * (
        c != 0
    )
    if not exponents:
        return c
    unit = Fraction(2) ** (max(exponents) - 24)
    total = sum(trunc(Fraction(x) * Fraction(y) / unit) for x, y in zip([c, *a], [1.0, *b], strict=True)) * unit
    last = Fraction(2) ** (frexp(float(total))[1] - 24)  # of fp32
    return float(trunc(total / last) * last)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
def test_tensor_core_products(name: str, size: float) -> None:
    """``size``: of what is added to, beside products of about 1."""
    torch.manual_seed(1)
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    a, b, c = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.randn(16, 8) * size
    a[0, :9] = c[0, :4] = 0.0
    out = c.repeat(2, 1, 1)
    assert run(f"products_{name}", a, b.T.contiguous(), b, out) == 0
    expected = c.clone()
    for i, j in product(range(16), range(8)):
        for k in (slice(0, 8), slice(8, 16)):
            expected[i, j] = sum_of_products(expected[i, j].item(), a[i, k].tolist(), b[k, j].tolist())
    assert torch.equal(out[0], expected)
    assert torch.equal(out[1], expected)
    assert not torch.equal(expected, (a.double() @ b.double() + c.double()).float())


def test_tensor_cores_pass_on_what_is_not_finite() -> None:
    a, b = torch.ones(16, 16).half(), torch.ones(16, 8).half()
    a[0, 3], a[1, 2] = torch.inf, torch.nan
    out = torch.zeros(2, 16, 8)
    assert run("products_fp16", a, b.T.contiguous(), b, out) == 0
    assert (out[:, 0] == torch.inf).all()
    assert out[:, 1].isnan().all()
    assert (out[:, 2:] == 16).all()


@pytest.mark.parametrize("start", [0.0, 100.0])
def test_sums_over_32k_keys_keep_the_documented_bound(start: float) -> None:
    """A warp of an attention block adds the products of 8,192 of 32,768 keys, 16 at a time and each twice
    (docs/kernels.md): with positive values all that is cut off goes one way."""
    torch.manual_seed(2)
    times = 8192 // 16 * 2
    a, b = torch.rand(16, 16).half() / 10, torch.rand(16, 8).half()
    exact = start + times * (a.double() @ b.double())
    out = torch.full((16, 8), start)
    assert run("repeated_products", a, b.T.contiguous(), out, times) == 0
    error = (out.double() - exact) / exact
    assert (error <= 0).all()
    assert error.min() > -2 * times * 10 * 2.0**-24
    assert error.mean() < -times * 2.0**-24  # it is no rounding to nearest


def test_transposed_matrix_loads() -> None:
    tiles = torch.randint(0, 2**15, (4, 8, 8), dtype=torch.int16)
    out = torch.zeros(32, 4, dtype=torch.int32)
    assert run("transposed_matrices", tiles, out) == 0
    pairs = out.view(torch.int16).view(32, 4, 2)
    for lane in range(32):
        for matrix in range(4):
            rows = 2 * (lane % 4)
            assert torch.equal(pairs[lane, matrix], tiles[matrix, rows : rows + 2, lane // 4])


@pytest.mark.parametrize("x", [0, 1, 0x80000000, 0xDEADBEEF, 0x00012340])
def test_functions_of_bits(x: int) -> None:
    exponent = -3.7
    y = int(torch.tensor(exponent).view(torch.int32)) & 0xFFFFFFFF
    out = torch.zeros(8, dtype=torch.int32)
    assert run("bits", x, y, out) == 0
    got = [value & 0xFFFFFFFF for value in out.tolist()]
    digits = f"{x:032b}"
    table = [*x.to_bytes(4, "little"), *y.to_bytes(4, "little")]
    assert got[:4] == [32 - x.bit_length(), (x & -x).bit_length(), digits.count("1"), int(digits[::-1], 2)]
    assert got[4] == x * y >> 32
    assert got[5] == int.from_bytes(bytes(table[i] for i in (2, 6, 0, 7)), "little")
    assert got[6] == x
    assert out[7:].view(torch.float32).item() == pytest.approx(2**exponent, rel=1e-6)


@pytest.mark.parametrize(
    ("grid", "threads", "shared", "allowed", "error"),
    [
        ((1, 1, 1), 1024, 48 * 1024, 0, 0),
        ((1, 1, 1), 1025, 1, 0, INVALID_CONFIGURATION),
        ((1, 1, 1), 0, 1, 0, INVALID_CONFIGURATION),
        ((0, 1, 1), 1, 1, 0, INVALID_CONFIGURATION),
        ((1, 65536, 1), 1, 1, 0, INVALID_CONFIGURATION),
        ((1, 1, 65536), 1, 1, 0, INVALID_CONFIGURATION),
        ((1, 1, 1), 1, 48 * 1024 + 1, 0, INVALID_VALUE),
        ((1, 1, 1), 1, 227 * 1024, 227 * 1024, 0),
        ((1, 1, 1), 1, 227 * 1024, 227 * 1024 + 1, INVALID_VALUE),
    ],
)
def test_a_launch_that_a_gpu_refuses_is_refused(
    grid: tuple[int, int, int], threads: int, shared: int, allowed: int, error: int
) -> None:
    sizes = ", ".join(map(str, (*grid, threads)))
    finished = alone(f"print(library.run_launch({sizes}, ctypes.c_size_t({shared}), {allowed}))")
    assert finished.stdout.strip() == str(error), finished.stderr


def alone(statement: str) -> subprocess.CompletedProcess[str]:
    """Runs a statement about ``library`` in a process of its own."""
    path = build.library(SOURCE)._name
    program = f"import ctypes; library = ctypes.CDLL({path!r}); memory = (ctypes.c_float * 64)(); {statement}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("divergent_barrier()", r"cuda_emu: divergent_barrier, block \(0, 0, 0\): a divergent barrier"),
        ("divergent_shuffle(memory)", r"16 to 31 wait in __any_sync, mask ffffffff"),
        ("waits_for_a_barrier_and_a_warp(memory)", r"3 to 3 wait in __syncthreads, line \d+\n"),
        ("writes_past_the_end(64, 64)", "writes_past_the_end, .*an access outside dynamic shared memory"),
        ("writes_past_the_end(64, -1)", "writes_past_the_end, .*a write before dynamic shared memory"),
        ("misaligned_vector(memory, memory)", "misaligned address"),
    ],
)
def test_what_a_gpu_would_leave_undefined_aborts(call: str, message: str) -> None:
    finished = alone(f"library.run_{call}")
    assert finished.returncode != 0
    assert re.search(message, finished.stderr), finished.stderr

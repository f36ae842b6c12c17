"""The read bandwidth that shares of a limit are taken of."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

from bench.shared import bandwidth
from bench.shared.bandwidth import CpuStream, last_level_cache, read_bandwidth
from pearl.errors import PearlError
from pearl_kernels.checks import DTYPE_CODES
from pearl_kernels.cpu import _core


@pytest.mark.parametrize("streams", [1, 8])
@pytest.mark.parametrize("lines", [1, 7, 8, 9, 1003])
def test_the_kernel_reads_every_cache_line(lines: int, streams: int) -> None:
    """It returns the lines' first words or-ed: a line that it left out would be missed."""
    words = torch.zeros(lines * 8 + 5, dtype=torch.int64)
    for line in (0, lines // 2, lines - 1):
        words[line * 8] = 1 << (line % 60)
    expected = 0
    for word in words[: lines * 8 : 8].tolist():
        expected |= word
    assert expected
    assert _core.stream_read(words.data_ptr(), lines * 64 + 40, streams) == expected


def test_nothing_to_read() -> None:
    address = torch.ones(8, dtype=torch.int64).data_ptr()
    assert [_core.stream_read(address, 0, streams) for streams in (1, 8)] == [0, 0]
    with pytest.raises(ValueError, match="1 or 8 streams, not 3"):
        _core.stream_read(address, 0, 3)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_bandwidth_is_a_plausible_number(threads: int) -> None:
    assert 0.1 < read_bandwidth(1 << 20, threads=threads, repeats=3) < 10_000


def test_gb_s_are_bytes_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with CpuStream(1 << 16, threads=2) as stream:
        monkeypatch.setattr(stream, "_stretch", lambda passes: passes * 0.5)
        assert stream.gb_s() == pytest.approx((1 << 16) / 0.5 / 1e9)


def test_each_thread_reads_its_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    with CpuStream(64 * 6 + 63, threads=3) as stream:
        monkeypatch.setattr(stream, "_read", lambda address, size, streams: read.append((address, size)))
        stream.gb_s()
    addresses = sorted({address for address, _ in read})
    assert {size for _, size in read} == {128}
    assert [b - a for a, b in itertools.pairwise(addresses)] == [128, 128]


def test_too_few_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="100 bytes are too few for 2 threads"):
        CpuStream(100, threads=2)


def test_without_the_core_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import pearl_kernels.cpu as package

    monkeypatch.delattr(package, "_core")
    monkeypatch.setitem(sys.modules, "pearl_kernels.cpu._core", None)
    with pytest.raises(PearlError, match=r"not built .*pip install -e \."):
        read_bandwidth(1 << 20)


@pytest.mark.parametrize(("text", "size"), [("512K\n", 512 << 10), ("32768K", 32 << 20), ("96M", 96 << 20)])
def test_sizes_as_the_kernel_writes_them(text: str, size: int) -> None:
    assert bandwidth._bytes(text) == size


def test_the_last_level_cache_is_megabytes() -> None:
    assert 1 << 19 <= last_level_cache() <= 1 << 32


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_reads_faster_than_a_cpu_thread() -> None:
    assert read_bandwidth(256 << 20, "cuda") > 100
    assert last_level_cache("cuda") >= 1 << 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))
def test_the_arithmetic_limit_counts_its_operations(dtype: torch.dtype) -> None:
    """A multiplication and an addition in each lane of twelve sums, or two of each where pairs are multiplied; of AMX's
    tiles, 16 pairs for each of 16 x 16 sums, four times.
    """
    isa, is_bf16 = _core.isa(), dtype == torch.bfloat16
    products = 12 * (8 if isa == "avx2" else 16) * (2 if is_bf16 and isa == "avx512bf16" else 1)
    if is_bf16 and isa == "amx":
        products = 4 * 16 * 16 * 32
    assert _core.multiply_registers(DTYPE_CODES[dtype], 1000) == 1000 * products * 2
    assert _core.multiply_registers(DTYPE_CODES[dtype], 0) == 0

"""Which contenders run which shapes, and the ``bench`` fixture that checks and measures them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.kernels.kernel_bench import Bench, Limits, providers


def _device(config: pytest.Config) -> str:
    return config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")


def _sizes(config: pytest.Config) -> str:
    return config.getoption("--shapes") or ("real" if _device(config) == "cuda" else "small")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A ``kernel`` test runs for each dtype, shape, and contender: the providers that can run here, then the rivals."""
    marker = metafunc.definition.get_closest_marker("kernel")
    if marker is None:
        return
    device, sizes = _device(metafunc.config), _sizes(metafunc.config)
    dtypes = marker.kwargs.get("dtypes", (torch.bfloat16,))
    rivals = [rival for rival in marker.kwargs["rivals"] if rival.runs_on(device)]
    cases = [
        pytest.param(shape, dtype, contender, id=f"{shape}-{str(dtype).removeprefix('torch.')}-{contender.name}")
        for shape in marker.kwargs["shapes"][sizes]
        for dtype in dtypes
        for contender in (*providers(marker.args[0], device, dtype, sizes), *rivals)
    ]
    metafunc.parametrize(("shape", "dtype", "contender"), cases)


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Our CPU kernels run on one thread; what they are compared with gets as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest) -> Limits:
    device = _device(request.config)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch sees no CUDA device", returncode=4)
    return Limits(device)


@pytest.fixture
def bench(
    benchmark: Any, limits: Limits, one_thread: None, dtype: torch.dtype, request: pytest.FixtureRequest
) -> Iterator[Bench]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield Bench(benchmark, limits, dtype, _sizes(request.config))

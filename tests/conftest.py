"""Set before anything imports triton or starts OpenMP's threads."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads collapse on shared cores

from collections.abc import Iterator

import pytest
import torch

# Without a GPU Triton's kernels run on CPU tensors. A process has one or the other, from triton's first import on.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are so small that a second thread only costs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

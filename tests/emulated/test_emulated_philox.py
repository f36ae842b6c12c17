"""Randomness of the Triton provider: the reference's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from ops_support import interpreted

from pearl_kernels.reference.philox import Stream, philox_4x32, to_uniform, uniform
from pearl_kernels.triton import philox

pytestmark = interpreted
WIDTH = 1024


@triton.jit
def noise_kernel(seed: Any, position: Any, u: Any, e: Any, one: Any, stream: Any, first: Any, WIDTH: tl.constexpr):
    row = tl.program_id(0)
    key, counter = tl.load(seed + row), tl.load(position + row)
    at = row * WIDTH + tl.arange(0, WIDTH)
    tl.store(u + at, philox.uniforms(key, counter, stream, first, WIDTH))
    tl.store(e + at, philox.exponentials(key, counter, stream, first, WIDTH))
    tl.store(one + row + tl.arange(0, 1), philox.uniform(key, counter + tl.zeros([1], tl.int64), stream))


@pytest.mark.parametrize("stream", list(Stream))
@pytest.mark.parametrize("first", [0, 4, 128252])
def test_uniforms_are_bit_exact_and_exponentials_accurate(stream: Stream, first: int) -> None:
    torch.manual_seed(3)
    seed = torch.cat((torch.tensor([0, -1, 2**63 - 1, -(2**63)]), torch.randint(-(2**63), 2**63 - 1, (4,))))
    position = torch.cat((torch.tensor([0, 2**32 - 1]), torch.randint(0, 2**32, (6,))))
    u, e, one = torch.empty(8, WIDTH), torch.empty(8, WIDTH), torch.empty(8)
    noise_kernel[(8,)](seed, position, u, e, one, int(stream), first, WIDTH)
    block = torch.arange(first // 4, (first + WIDTH) // 4)
    bits = philox_4x32(seed[:, None], position[:, None], torch.full((8, 1), stream), block[None]).flatten(1)
    assert torch.equal(u, to_uniform(bits))
    assert torch.equal(one, uniform(seed, position, stream))
    exact = -torch.log(1.0 - u.double())
    small = u < 2.0**-7
    torch.testing.assert_close(e[small].double(), exact[small], rtol=3e-7, atol=0)
    torch.testing.assert_close(e[~small].double(), -torch.log((1.0 - u[~small]).double()), rtol=2e-7, atol=0)

"""Long sums on tensor cores, which cut off what they cannot hold: the error of CUDA's verify_attention at 32k keys."""

from __future__ import annotations

import pytest
import torch
from cuda_emu import build
from ops_support import paged

pytestmark = build.on_linux

attention = build.operator("verify_attention")


@pytest.mark.parametrize("rows", [1, 33], ids=("decoding", "a prompt, which is not split"))
def test_sums_over_32k_keys_keep_the_documented_bound(rows: int) -> None:
    """With values above 0, of which a little is lost at each addition (docs/kernels.md)."""
    n, page_size, width = 32768, 16, 64
    q, cache = torch.randn(rows, 1, width).half(), paged([rows], [n], 1, width, page_size, torch.float16)
    cache.v_cache.abs_().mul_(0.3).add_(0.5)
    used = cache.block_tables[0, : n // page_size].long()
    keys, values = (pages[used].reshape(n, width).double() for pages in (cache.k_cache, cache.v_cache))
    scores = q[:, 0].double() @ keys.T / 8
    later = torch.arange(n) > torch.arange(n - rows, n)[:, None]
    expected = scores.masked_fill(later, -torch.inf).softmax(-1) @ values
    index = (cache.block_tables, cache.query_start, cache.context_lens)
    out = attention(q, cache.k_cache, cache.v_cache, *index, 1 / 8, 0, 0.0)
    error = (out[:, 0].double() - expected) / expected
    assert error.abs().max() < 2.0**-11 + n / 16 * 10 * 2.0**-24  # rounding, and the bound
    assert abs(error.mean()) < 2e-4

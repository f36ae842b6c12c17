"""The GPU providers' norms, activations and scaling: wide rows, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_support import ULPS, Implementation, assert_rounds_to, emulated

from pearl_kernels import cpu, reference
from pearl_kernels.triton import norm


@pytest.mark.parametrize("add_rms_norm", emulated("add_rms_norm"))
def test_a_wide_row(add_rms_norm: Implementation) -> None:
    x, residual, weight = torch.randn(1, 9001).half(), torch.randn(1, 9001).half(), torch.randn(9001).half()
    summed = residual.clone()
    reference.add_rms_norm(x, summed, weight, 1e-5)
    out = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, summed)
    assert_rounds_to(out, reference.rms_norm(summed.float(), weight.float(), 1e-5), ULPS[torch.float16])


BAD_CALLS: dict[str, tuple[str, Callable[[], tuple[Any, ...]]]] = {
    "rank": ("rms_norm", lambda: (torch.ones(4), torch.ones(4), 1e-6)),
    "width": ("rms_norm", lambda: (torch.ones(2, 4), torch.ones(5), 1e-6)),
    "weight-dtype": ("rms_norm", lambda: (torch.ones(2, 4), torch.ones(4).bfloat16(), 1e-6)),
    "columns-apart": ("rms_norm", lambda: (torch.ones(4, 2).T, torch.ones(4), 1e-6)),
    "residual-rows": ("add_rms_norm", lambda: (torch.ones(2, 4), torch.ones(3, 4), torch.ones(4), 1e-6)),
    "odd": ("silu_and_mul", lambda: (torch.ones(2, 7),)),
    "activation-rank": ("silu_and_mul", lambda: (torch.ones(2, 4, 4),)),
    "gelu-odd": ("gelu_and_mul", lambda: (torch.ones(2, 7),)),
    "scale-rank": ("scale_and_cap", lambda: (torch.ones(4), 2.0)),
    "scale-columns-apart": ("scale_and_cap", lambda: (torch.ones(4, 2).T, 2.0, 1.0)),
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

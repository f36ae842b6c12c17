"""What the ``verify_attention`` of installed packages (flash-attn, FlashInfer) have in common."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from pearl_kernels.checks import Checks
from pearl_kernels.operands import AttentionSizes, check_attention
from pearl_kernels.provider import Situation

DTYPES = (torch.bfloat16, torch.float16)


def checked_sizes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    most_rows: int = 0,
) -> AttentionSizes:
    """The sizes of a call whose tensors are what the operator asks for, q and the caches of one dtype; else ValueError.

    All must be on q's device, whichever it is: the packages refuse a device that they do not know themselves.
    """
    checks, index = _checks(q.device.type), (block_tables, query_start, context_lens)
    return check_attention(checks, q, k_cache, v_cache, *index, most_rows, cache_dtype=q.dtype)


def refuse_sinks(package: str, sinks: Tensor | None) -> None:
    if sinks is not None:
        raise ValueError(f"verify_attention: {package} as it is called here has no attention sinks")


@functools.cache
def _checks(device: str) -> Checks:
    return Checks(device, DTYPES)


def refuses(package: str, situation: Situation) -> str | None:
    """Why neither package can run in ``situation``; None leaves it to the package's own limits."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if situation.device != "cuda":
        return f"runs on cuda, not on {situation.device}"
    if situation.dtype not in DTYPES:
        return f"computes bfloat16 and float16, not {situation.dtype}"
    if situation.sinks:
        return "its attention, as it is called here, has no sinks"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    return None

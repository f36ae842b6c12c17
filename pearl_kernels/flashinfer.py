"""``verify_attention`` through FlashInfer (arXiv 2501.01005), where the package ``flashinfer-python`` is installed.

FlashInfer plans each batch on the host: **every call waits for the device once**, to read lengths and page tables, and
so cannot be captured in a CUDA graph (RuntimeError). The plan is kept as long as they stay the same, which they do
through the layers of a forward. How the keys are split follows the whole batch, so the rounding of a row may depend
on what else is in its batch. The first call for a dtype and head_dim compiles the kernel if the package has none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pearl_kernels import packaged_attention
from pearl_kernels.operands import AttentionSizes
from pearl_kernels.provider import Situation

_HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 << 20  # what its documentation recommends


class FlashInferAttention:
    """The operator of one worker: a workspace on its device, and the plan of the latest batch."""

    def __init__(self) -> None:
        self._wrapper: Any = None
        self._device: torch.device | None = None
        self._planned: tuple[tuple[Any, ...], Tensor] | None = None  # the call's numbers, and its index tensors

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        most_rows: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """As ``pearl_kernels.reference.verify_attention``; q and the caches are of one dtype, bf16 or fp16.

        Probabilities are rounded to that dtype before they meet the values, so the result is less exact than our own
        kernels'. Raises ValueError for inputs that it cannot take, RuntimeError while a CUDA graph is captured.
        """
        packaged_attention.refuse_sinks("flashinfer", sinks)
        sizes = packaged_attention.checked_sizes(
            q, k_cache, v_cache, block_tables, query_start, context_lens, most_rows
        )
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("verify_attention: flashinfer plans on the host and cannot be captured in a CUDA graph")
        if sizes.rows == 0:
            return q.new_empty(q.shape)
        self._settle_on(q.device)
        index = torch.cat((context_lens, query_start, block_tables.flatten())).cpu()
        numbers = (*sizes, q.dtype, scale, window, softcap)
        if self._planned is None or self._planned[0] != numbers or not torch.equal(self._planned[1], index):
            self._planned = None  # should the plan fail, there is none
            self._plan(sizes, index, q.dtype, scale, window, softcap)
            self._planned = numbers, index
        out: Tensor = self._wrapper.run(q, (k_cache, v_cache))
        return out

    def _settle_on(self, device: torch.device) -> None:
        if self._device != device:
            package = importlib.import_module("flashinfer")
            workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            self._wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            self._device, self._planned = device, None

    def _plan(
        self,
        sizes: AttentionSizes,
        index: Tensor,
        dtype: torch.dtype,
        scale: float,
        window: int,
        softcap: float,
    ) -> None:
        r = sizes.sequences
        lengths, starts, tables = index[:r], index[r : 2 * r + 1], index[2 * r + 1 :].view(r, -1)
        self._wrapper.plan(
            *page_lists(lengths, starts, tables, sizes.page_size),
            sizes.query_heads,
            sizes.kv_heads,
            sizes.head_dim,
            sizes.page_size,
            causal=True,  # aligned to the last key of each sequence, as ours is
            sm_scale=scale,
            window_left=window - 1 if window > 0 else -1,  # keys to the left of a row's own
            logits_soft_cap=softcap if softcap > 0 else None,
            q_data_type=dtype,
            kv_data_type=dtype,
        )


def page_lists(
    lengths: Tensor, starts: Tensor, tables: Tensor, page_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FlashInfer's form of ``(context_lens, query_start, block_tables)``, all int32 on CPU, of sequences with rows.

    Returns qo_indptr ``[r + 1]``, paged_kv_indptr ``[r + 1]``, paged_kv_indices (the pages of all sequences, one after
    another) and paged_kv_last_page_len ``[r]``, in ``[1, page_size]``.
    """
    counts = starts.diff()
    live = counts > 0  # such a sequence has at least as many keys as rows
    lengths, counts, tables = lengths[live], counts[live], tables[live]
    pages = (lengths + page_size - 1) // page_size
    used = torch.arange(tables.shape[1]) < pages[:, None]
    return _indptr(counts), _indptr(pages), tables[used], lengths - (pages - 1) * page_size


def _indptr(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


class _OneForEachWorker(Mapping[str, Callable[..., Any]]):
    """Whoever takes the operator gets one of its own: two workers plan and run at the same time."""

    def __getitem__(self, op: str) -> Callable[..., Any]:
        if op != "verify_attention":
            raise KeyError(op)
        return FlashInferAttention()

    def __iter__(self) -> Iterator[str]:
        yield "verify_attention"

    def __len__(self) -> int:
        return 1


OPERATORS: Mapping[str, Callable[..., Any]] = _OneForEachWorker()


def refuses(op: str, situation: Situation) -> str | None:
    """None if ``op`` can run in ``situation`` with a package that works, else why not. Does not import it."""
    if reason := packaged_attention.refuses("flashinfer", situation):
        return reason
    if situation.head_dim not in _HEAD_DIMS:
        return f"has kernels for a head_dim of {', '.join(map(str, _HEAD_DIMS))}, not {situation.head_dim}"
    return None


def missing() -> str | None:
    """None if the package can be imported and has what is called here, else why not."""
    try:
        package = importlib.import_module("flashinfer")
    except Exception as error:  # built for another torch, or without a library that it needs
        return f"flashinfer cannot be imported: {error}"
    if not hasattr(getattr(package, "BatchPrefillWithPagedKVCacheWrapper", None), "run"):
        return "needs flashinfer 0.2 or newer"
    return None

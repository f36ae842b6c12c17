"""Stand-ins for flash-attn and FlashInfer: their documented functions in plain torch, which check what those do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def attend(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, left: int, softcap: float, causal: bool = True
) -> Tensor:
    """``[m, Hq, D]``: rows at the end of the keys; ``left`` >= 0 keys before a row's own are seen."""
    m, length = q.shape[0], keys.shape[0]
    group = q.shape[1] // keys.shape[1]
    scores = torch.einsum("qgkd,lkd->gkql", q.float().unflatten(1, (-1, group)).transpose(1, 2), keys.float()) * scale
    if softcap > 0:
        scores = (scores / softcap).tanh() * softcap
    distance = torch.arange(length - m, length)[:, None] - torch.arange(length)
    hidden = (distance < 0) & torch.tensor(causal)
    if left >= 0:
        hidden |= distance > left
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("gkql,lkd->qkgd", weights, values.float()).flatten(1, 2).to(q.dtype)


def pages_of(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    return cache[pages.long()].flatten(0, 1)[:length]


@dataclass
class FakeFlashAttn:
    """flash_attn_with_kvcache and flash_attn_varlen_func of flash-attn 2.8 with a block table."""

    calls: list[str] = field(default_factory=list)

    def check(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> None:
        assert q.dtype in (torch.float16, torch.bfloat16)
        assert k_cache.dtype == v_cache.dtype == q.dtype
        assert k_cache.shape[1] % 256 == 0
        assert block_table.dtype == torch.int32
        assert {q.stride(-1), k_cache.stride(-1), v_cache.stride(-1), block_table.stride(-1)} == {1}

    def flash_attn_with_kvcache(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Any = None, v: Any = None, rotary_cos: Any = None,
        rotary_sin: Any = None, cache_seqlens: Tensor | None = None, cache_batch_idx: Any = None,
        cache_leftpad: Any = None, block_table: Tensor | None = None, softmax_scale: float | None = None,
        causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        rotary_interleaved: bool = True, alibi_slopes: Any = None, num_splits: int = 0,
        return_softmax_lse: bool = False,
    ) -> Tensor:  # fmt: skip
        self.calls.append("flash_attn_with_kvcache")
        assert cache_seqlens is not None
        assert block_table is not None
        assert softmax_scale is not None
        self.check(q, k_cache, v_cache, block_table)
        assert cache_seqlens.shape == block_table.shape[:1] == q.shape[:1]
        out = []
        for rows, table, length in zip(q, block_table, cache_seqlens.tolist(), strict=True):
            used = table[: -(-length // k_cache.shape[1])]
            keys, values = (pages_of(c, used, length) for c in (k_cache, v_cache))
            out.append(attend(rows, keys, values, softmax_scale, window_size[0], softcap, causal))
        assert window_size[1] == (-1 if window_size[0] < 0 else 0)
        return torch.stack(out)

    def flash_attn_varlen_func(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        self.calls.append("flash_attn_varlen_func")
        assert block_table is not None
        assert softmax_scale is not None
        self.check(q, k, v, block_table)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q.shape == cu_seqlens_k.shape == (block_table.shape[0] + 1,)
        assert dropout_p == 0.0
        if max_seqlen_q == 1:  # the real one reshapes q to [batch, ...] then
            assert q.shape[0] == block_table.shape[0]
        starts, ends = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for r in range(block_table.shape[0]):
            rows, length = slice(starts[r], starts[r + 1]), ends[r + 1] - ends[r]
            assert starts[r + 1] - starts[r] <= max_seqlen_q
            assert length <= max_seqlen_k
            used = block_table[r, : -(-length // k.shape[1])]
            keys, values = (pages_of(c, used, length) for c in (k, v))
            out[rows] = attend(q[rows], keys, values, softmax_scale, window_size[0], softcap, causal)
        return out


class FakeWrapper:
    """flashinfer.BatchPrefillWithPagedKVCacheWrapper of 0.2 to 0.7, without CUDA graphs."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert float_workspace_buffer.numel() >= 128 << 20
        assert (kv_layout, use_cuda_graph) == ("NHD", False)
        self.plans: list[dict[str, Any]] = []

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor, paged_kv_last_page_len: Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None, packed_custom_mask: Tensor | None = None, causal: bool = False,
        pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False, sm_scale: float | None = None,
        window_left: int = -1, logits_soft_cap: float | None = None, rope_scale: float | None = None,
        rope_theta: float | None = None, q_data_type: str | torch.dtype = "float16",
        kv_data_type: str | torch.dtype | None = None, non_blocking: bool = True,
    ) -> None:  # fmt: skip
        arguments = {name: value for name, value in locals().items() if name != "self"}
        indices = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert {t.dtype for t in indices} == {torch.int32}
        assert (qo_indptr.diff() > 0).all()
        assert paged_kv_indptr[-1] == len(paged_kv_indices)
        assert ((paged_kv_last_page_len >= 1) & (paged_kv_last_page_len <= page_size)).all()
        assert num_qo_heads % num_kv_heads == 0
        assert head_dim_qk in (64, 128, 256)
        self.plans.append(arguments)

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        p = self.plans[-1]
        assert q.dtype == p["q_data_type"] == p["kv_data_type"] == paged_kv_cache[0].dtype
        assert paged_kv_cache[0].stride() == paged_kv_cache[1].stride()
        assert paged_kv_cache[0].shape[1:] == (p["page_size"], p["num_kv_heads"], p["head_dim_qk"])
        assert q.shape == (p["qo_indptr"][-1], p["num_qo_heads"], p["head_dim_qk"])
        starts, pages = p["qo_indptr"].tolist(), p["paged_kv_indptr"].tolist()
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for r, last in enumerate(p["paged_kv_last_page_len"].tolist()):
            used = p["paged_kv_indices"][pages[r] : pages[r + 1]]
            length = (len(used) - 1) * p["page_size"] + last
            keys, values = (pages_of(c, used, length) for c in paged_kv_cache)
            rows = slice(starts[r], starts[r + 1])
            softcap = p["logits_soft_cap"] or 0.0
            out[rows] = attend(q[rows], keys, values, p["sm_scale"], p["window_left"], softcap, p["causal"])
        return out

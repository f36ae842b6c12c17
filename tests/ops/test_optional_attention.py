"""verify_attention through flash-attn and FlashInfer: what our adapters hand to the packages, and what they refuse.

The packages need a GPU. Their documented functions stand in here, written in plain torch, with the constraints that
the real ones check; where a package is installed on a GPU, it is tested itself.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from ops_support import Paged, paged, strided_rows
from torch import Tensor

from pearl_kernels import Situation, reference, registry
from pearl_kernels import flash_attn as flash_adapter
from pearl_kernels import flashinfer as flashinfer_adapter
from pearl_kernels.flashinfer import FlashInferAttention, page_lists
from pearl_kernels.registry import explain, select

GROUP, KV_HEADS, HEAD_DIM = 3, 2, 64
MIXED = [(1, 1), (1, 260), (5, 67), (4, 4), (0, 9), (70, 531), (1, 512), (0, 0)]  # (rows, keys) of each sequence
FLASH = Situation("cuda", torch.bfloat16, 128, page_size=256)
FLASHINFER = Situation("cuda", torch.bfloat16, 128)


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


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(contents)
    return made


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttn:
    fake = FakeFlashAttn()
    functions = {name: getattr(fake, name) for name in ("flash_attn_with_kvcache", "flash_attn_varlen_func")}
    monkeypatch.setitem(sys.modules, "flash_attn", module("flash_attn", **functions))
    return fake


@pytest.fixture
def wrappers(monkeypatch: pytest.MonkeyPatch) -> list[FakeWrapper]:
    """Every wrapper that is made of the fake flashinfer."""
    made: list[FakeWrapper] = []

    class Wrapper(FakeWrapper):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setitem(
        sys.modules, "flashinfer", module("flashinfer", BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    )  # fmt: skip
    return made


@pytest.fixture
def attentions(flash_attn: FakeFlashAttn, wrappers: list[FakeWrapper]) -> dict[str, Callable[..., Tensor]]:
    return {"flash_attn": flash_adapter.verify_attention, "flashinfer": FlashInferAttention()}


both_adapters = pytest.mark.parametrize("name", ["flash_attn", "flashinfer"])


def inputs(sequences: Sequence[tuple[int, int]], page_size: int = 256) -> tuple[Tensor, Paged]:
    rows, keys = zip(*sequences, strict=True)
    cache = paged(rows, keys, KV_HEADS, HEAD_DIM, page_size, torch.bfloat16)
    return strided_rows((torch.randn(sum(rows), GROUP * KV_HEADS, HEAD_DIM) * 2).bfloat16()), cache


def arguments(q: Tensor, cache: Paged) -> tuple[Tensor, ...]:
    return (q, cache.k_cache, cache.v_cache, cache.block_tables, cache.query_start, cache.context_lens)


def assert_close(out: Tensor, exact: Tensor) -> None:
    assert out.shape == exact.shape
    assert out.dtype == exact.dtype
    torch.testing.assert_close(out, exact, rtol=2e-2, atol=2e-2)


@both_adapters
@pytest.mark.parametrize("sequences", [MIXED, [(1, 700)], [(9, 300)], [(0, 5), (1, 257)], [(1, 8)] * 3], ids=str)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (1, 0.0), (40, 0.0), (0, 5.0), (300, 2.0)])
def test_ragged_rows_match_the_reference(
    attentions: dict[str, Callable[..., Tensor]],
    name: str,
    sequences: list[tuple[int, int]],
    window: int,
    softcap: float,
) -> None:
    q, cache = inputs(sequences)
    call = (*arguments(q, cache), 0.2, window, softcap)
    assert_close(attentions[name](*call), reference.verify_attention(*call))


@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_flashinfer_takes_any_page_size(attentions: dict[str, Callable[..., Tensor]], page_size: int) -> None:
    call = (*arguments(*inputs(MIXED, page_size)), 0.125)
    assert_close(attentions["flashinfer"](*call), reference.verify_attention(*call))


@both_adapters
def test_no_rows_at_all(attentions: dict[str, Callable[..., Tensor]], name: str) -> None:
    q, cache = inputs([(0, 0), (0, 17)])
    assert attentions[name](*arguments(q, cache), 1.0).shape == (0, GROUP * KV_HEADS, HEAD_DIM)


def test_one_sequence_may_split_its_keys(flash_attn: FakeFlashAttn) -> None:
    """flash_attn_varlen_func never splits, which leaves most of a GPU idle with one sequence."""
    for sequences in ([(9, 300)], [(1, 300), (2, 20)]):
        flash_adapter.verify_attention(*arguments(*inputs(sequences)), 1.0)
    assert flash_attn.calls == ["flash_attn_with_kvcache", "flash_attn_varlen_func"]


def test_a_plan_serves_all_layers_of_a_forward(
    attentions: dict[str, Callable[..., Tensor]], wrappers: list[FakeWrapper]
) -> None:
    attention, (q, cache) = attentions["flashinfer"], inputs(MIXED)
    for _ in range(3):
        attention(*arguments(q, cache), 0.1)
    ((wrapper,), plans) = wrappers, wrappers[0].plans
    assert len(plans) == 1
    attention(*arguments(q, cache), 0.1, 7)  # a layer with a window
    assert len(plans) == 2
    cache.block_tables[6, :2] = cache.block_tables[6, :2].flip(0)  # in place, as buffers that are used again
    assert_close(
        attention(*arguments(q, cache), 0.1, 7), reference.verify_attention(*arguments(q, cache), 0.1, 7)
    )  # fmt: skip
    assert len(plans) == 3
    assert wrapper is wrappers[-1]


def test_a_plan_that_failed_is_not_used(
    attentions: dict[str, Callable[..., Tensor]], wrappers: list[FakeWrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    attention, call = attentions["flashinfer"], (*arguments(*inputs(MIXED)), 0.1)
    attention(*call)
    with monkeypatch.context() as patch:
        patch.setattr(FakeWrapper, "plan", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attention(*call, 5)
    assert_close(attention(*call), reference.verify_attention(*call))
    assert len(wrappers[0].plans) == 2


def test_page_lists_by_hand() -> None:
    lengths, starts = torch.tensor([5, 9, 4, 1]).int(), torch.tensor([0, 2, 2, 6, 7]).int()
    tables = torch.tensor([[7, 3, -1], [1, 2, 4], [6, -1, -1], [5, -9, -9]]).int()
    lists = [t.tolist() for t in page_lists(lengths, starts, tables, 4)]
    assert lists == [[0, 2, 6, 7], [0, 2, 3, 4], [7, 3, 6, 5], [1, 4, 1]]


def test_each_worker_gets_its_own_flashinfer(wrappers: list[FakeWrapper]) -> None:
    first, second = (select(FLASHINFER, {"verify_attention": "flashinfer"}).verify_attention for _ in range(2))
    assert isinstance(first, FlashInferAttention)
    assert isinstance(second, FlashInferAttention)
    assert first is not second
    with pytest.raises(KeyError):
        flashinfer_adapter.OPERATORS["sample"]


def test_flashinfer_is_an_error_under_graph_capture(
    attentions: dict[str, Callable[..., Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu(Tensor):
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    q, cache = inputs([(1, 8)])
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        attentions["flashinfer"](*arguments(q.as_subclass(OnGpu), cache), 1.0)


@both_adapters
def test_bad_inputs_are_refused(attentions: dict[str, Callable[..., Tensor]], name: str) -> None:
    q, cache = inputs([(3, 40)])
    attention = attentions[name]
    with pytest.raises(ValueError, match="q must be bfloat16 or float16"):
        attention(*arguments(q.float(), cache), 1.0)
    with pytest.raises(ValueError, match=r"k_cache must be contiguous torch\.float16"):
        attention(*arguments(q.half(), cache), 1.0)
    with pytest.raises(ValueError, match="6 query heads cannot be divided among 4 KV heads"):
        attention(q, *(c.repeat(1, 1, 2, 1) for c in (cache.k_cache, cache.v_cache)), *arguments(q, cache)[3:], 1.0)
    with pytest.raises(ValueError, match=r"block_tables must be \[sequences, pages\]"):
        attention(*arguments(q, replace(cache, block_tables=cache.block_tables[0])), 1.0)
    with pytest.raises(ValueError, match=r"context_lens must be contiguous torch\.int32"):
        attention(*arguments(q, replace(cache, context_lens=cache.context_lens.long())), 1.0)


def test_flash_attn_refuses_small_pages(flash_attn: FakeFlashAttn) -> None:
    with pytest.raises(ValueError, match="pages of a multiple of 256 tokens, not 48"):
        flash_adapter.verify_attention(*arguments(*inputs([(3, 40)], 48)), 1.0)
    assert flash_attn.calls == []


@pytest.mark.parametrize(
    ("provider", "situation", "reason"),
    [
        ("flash_attn", replace(FLASH, device="cpu"), "runs on cuda, not on cpu"),
        ("flash_attn", replace(FLASH, dtype=torch.float32), "computes bfloat16 and float16, not torch.float32"),
        ("flash_attn", replace(FLASH, head_dim=100), "needs a head_dim that is a multiple of 8 up to 256, not 100"),
        ("flash_attn", replace(FLASH, page_size=16), "needs a page_size that is a multiple of 256, not 16"),
        ("flashinfer", replace(FLASHINFER, device="cpu"), "runs on cuda, not on cpu"),
        ("flashinfer", replace(FLASHINFER, dtype=torch.float32), "computes bfloat16 and float16, not torch.float32"),
        ("flashinfer", replace(FLASHINFER, head_dim=96), "has kernels for a head_dim of 64, 128, 256, not 96"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("attentions")
def test_situations_that_are_refused(provider: str, situation: Situation, reason: str) -> None:
    (status,) = [s for s in explain("verify_attention", situation) if s.provider == provider]
    assert status.reason == reason


@pytest.mark.usefixtures("attentions")
def test_they_run_where_they_are_asked_for_and_never_by_default() -> None:
    for provider, situation in (("flash_attn", FLASH), ("flashinfer", FLASHINFER)):
        assert select(situation, {"verify_attention": provider}).providers["verify_attention"] == provider
    names = [provider.name for provider in registry.PROVIDERS]
    assert names.index("triton") < names.index("flash_attn") < names.index("flashinfer") < names.index("reference")


def absent(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))


@pytest.mark.parametrize(("provider", "situation"), [("flash_attn", FLASH), ("flashinfer", FLASHINFER)])
def test_what_is_missing_is_a_reason(provider: str, situation: Situation, monkeypatch: pytest.MonkeyPatch) -> None:
    def reason() -> str:
        return next(s.reason for s in explain("verify_attention", situation) if s.provider == provider)

    with monkeypatch.context() as patch:
        absent(patch, provider)
        assert reason() == f"{provider} is not installed"
    monkeypatch.setitem(sys.modules, provider, module(provider))
    assert reason().startswith("needs flash")

    real = importlib.import_module

    def broken(name: str) -> ModuleType:
        if name == provider:
            raise OSError("undefined symbol: _ZN3c10")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", broken)
    assert reason() == f"{provider} cannot be imported: undefined symbol: _ZN3c10"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "provider",
    [
        pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"no {name} here"))
        for name in ("flash_attn", "flashinfer")
    ],
)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (40, 0.0), (0, 5.0)])
def test_the_real_package_matches_the_reference(provider: str, window: int, softcap: float) -> None:
    attention = select(replace(FLASH, head_dim=HEAD_DIM), {"verify_attention": provider}).verify_attention
    for sequences in (MIXED, [(1, 700)], [(9, 300)]):
        call = (*(t.cuda() for t in arguments(*inputs(sequences))), 0.125, window, softcap)
        assert_close(attention(*call), reference.verify_attention(*call))

"""verify_attention through flash-attn and FlashInfer: what our adapters hand to the packages, and what they refuse.

The packages need a GPU: stand-ins take their place (``attention_packages``). Where a package is installed on a GPU,
it is tested itself.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_packages import FakeFlashAttn, FakeWrapper
from ops_support import Paged, paged, strided_rows
from torch import Tensor

from pearl_kernels import Situation, reference, registry
from pearl_kernels import flash_attn as flash_adapter
from pearl_kernels import flashinfer as flashinfer_adapter
from pearl_kernels.flashinfer import FlashInferAttention, page_lists
from pearl_kernels.provider import Provider
from pearl_kernels.registry import explain, select

GROUP, KV_HEADS, HEAD_DIM = 3, 2, 64
MIXED = [(1, 1), (1, 260), (5, 67), (4, 4), (0, 9), (70, 531), (1, 512), (0, 0)]  # (rows, keys) of each sequence
FLASH = Situation("cuda", torch.bfloat16, 128, page_size=256)
FLASHINFER = Situation("cuda", torch.bfloat16, 128)


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
def test_sinks_are_refused(attentions: dict[str, Callable[..., Tensor]], name: str) -> None:
    q, cache = inputs([(2, 9)])
    with pytest.raises(ValueError, match="as it is called here has no attention sinks"):
        attentions[name](*arguments(q, cache), 1.0, 0, 0.0, 0, torch.zeros(q.shape[1]))


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
        ("flash_attn", replace(FLASH, sinks=True), "its attention, as it is called here, has no sinks"),
        ("flashinfer", replace(FLASHINFER, sinks=True), "its attention, as it is called here, has no sinks"),
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


def test_a_package_is_imported_only_if_it_would_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes seconds, and starts CUDA: not for a report of what else there is."""
    imported: list[str] = []
    real = importlib.import_module

    def counting(name: str) -> ModuleType:
        if name in ("flash_attn", "flashinfer"):
            imported.append(name)
            return module(name)  # an empty one
        return real(name)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # all are installed
    monkeypatch.setattr(importlib, "import_module", counting)
    select(FLASH, {"verify_attention": "reference"})
    first = Provider("first", {"verify_attention": reference.verify_attention}, lambda op, situation: None)
    monkeypatch.setattr(registry, "PROVIDERS", (first, *registry.PROVIDERS))
    reasons = {status.provider: status.reason for status in explain("verify_attention", FLASH)}
    assert reasons["flash_attn"] == reasons["flashinfer"] == "first comes first"
    assert imported == []
    with pytest.raises(
        ValueError, match=r"flash_attn: needs flash-attn 2\.6 or newer; .*flashinfer: flash_attn was asked"
    ):
        explain("verify_attention", FLASH, {"verify_attention": "flash_attn"})
    assert imported == ["flash_attn"]


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

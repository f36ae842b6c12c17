"""What the operator tests share: the providers that can run here, tolerances, and inputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import interpreter_bf16
import pytest
import torch
from cuda_emu import build  # tests/cuda_emu
from torch import Tensor

from pearl_kernels import (
    ExpertWeights,
    LinearWeight,
    Routing,
    SamplingTensors,
    Situation,
    Verdict,
    cpu,
    cuda,
    reference,
)
from pearl_kernels.reference.philox import Stream, gumbel
from pearl_kernels.reference.sampling import log_probabilities
from pearl_kernels.registry import OPERATORS, PROVIDERS
from pearl_kernels.triton import interpreting

DTYPES = (torch.float32, torch.bfloat16)
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ULPS = {
    torch.float32: 0.0,
    torch.bfloat16: 0.5,
    torch.float16: 0.5 / 8,
}  # half a unit in the last place, in bf16's units
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("fp32", "bf16"))


@dataclass(frozen=True)
class Implementation:
    """One provider's operator on one device. Takes and returns CPU tensors; what it changes in place comes back.

    ``emulated``: a GPU's kernel on CPU tensors, which takes milliseconds for what a GPU does in nanoseconds.
    """

    function: Callable[..., Any]
    device: str
    emulated: bool = False
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.device == "cpu":
            return self.function(*args, **kwargs)
        there = [self._move(a) for a in args]
        result = self.function(*there, **{name: self._move(a) for name, a in kwargs.items()})
        for here, moved in zip(args, there, strict=True):
            if isinstance(here, Tensor):
                here.copy_(moved)
        return self._back(result)

    def _back(self, result: Any) -> Any:
        if isinstance(result, tuple):
            return type(result)(*map(self._back, result))
        return None if result is None else result.cpu()

    def _move(self, value: Any) -> Any:
        if isinstance(value, SamplingTensors):
            return SamplingTensors(*(getattr(value, f).to(self.device) for f in value.__dataclass_fields__))
        if isinstance(value, ExpertWeights | LinearWeight):
            return dataclasses.replace(value, **{name: self._move(part) for name, part in vars(value).items()})
        if isinstance(value, Routing):
            return Routing(*map(self._move, value))
        return value.to(self.device) if isinstance(value, Tensor) else value


def implementations(op: str, with_reference: bool = False) -> list[Any]:
    """pytest parameters: the providers that run ``op`` natively here, on every device there is."""
    params = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for provider in PROVIDERS:
            if provider.name in ("reference", *_emulated_on(device)) or op not in provider.operators:
                continue
            if provider.refuses(op, Situation(device=device)) is None:
                marks = [pytest.mark.gpu] if device == "cuda" else []
                made = Implementation(provider.operators[op], device, dtypes=_dtypes_on(device))
                params.append(pytest.param(made, id=f"{provider.name}-{device}", marks=marks))
    if op == "verify" and cpu.refuses(op, Situation()) is None:
        params.append(pytest.param(Implementation(verify_of_numbers, "cpu"), id="cpu-numbers"))
    if with_reference:
        params.append(pytest.param(Implementation(OPERATORS[op], "cpu"), id="reference"))
    return params


def verify_of_numbers(logits: Tensor, *args: Any, **kwargs: Any) -> Verdict:
    """``verify_numbers`` with ``verify``'s arguments: index arrays become lists, absent ones empty."""
    call = inspect.signature(reference.verify).bind(logits, *args, **kwargs)
    call.apply_defaults()
    lists = ("draft_tokens", "row_start", "positions", "draft_logprobs", "draft_rows", "draft_temperature")
    given = {name: call.arguments[name] for name in lists}
    call.arguments |= {name: [] if value is None else value.tolist() for name, value in given.items()}
    accepted, next_token = cpu.VERIFY_NUMBERS(**call.arguments)
    return Verdict(torch.tensor(accepted, dtype=torch.int32), torch.tensor(next_token, dtype=torch.int64))


def _dtypes_on(device: str) -> tuple[torch.dtype, ...]:
    return DTYPES if device == "cpu" else (*DTYPES, torch.float16)


def _emulated_on(device: str) -> tuple[str, ...]:
    return ("triton",) if device == "cpu" else ()


def emulated(op: str) -> list[Any]:
    """pytest parameters: the GPU providers of ``op`` on CPU tensors, Triton in its interpreter and CUDA under the shim.

    Sizes must fit: see ``Implementation.emulated``.
    """
    params, dtypes = [], _dtypes_on("cuda")
    for provider in (p for p in PROVIDERS if p.name in _emulated_on("cpu") and op in p.operators):
        if provider.refuses(op, Situation()) is None:
            interpreter_bf16.install()
            made = Implementation(provider.operators[op], "cpu", True, dtypes)
            # NumPy warns of logarithms of 0, of NaNs, and of exponentials that are meant to overflow.
            params.append(
                pytest.param(made, id=provider.name, marks=pytest.mark.filterwarnings("ignore::RuntimeWarning"))
            )
    if op in cuda.OPERATORS:
        params.append(
            pytest.param(Implementation(build.operator(op), "cpu", True, dtypes), id="cuda", marks=build.on_linux)
        )
    return params


interpreted = pytest.mark.skipif(not interpreting(), reason="with a GPU here Triton's kernels take no CPU tensors")


def triton_function(function: Callable[..., Any]) -> Implementation:
    """A function of Triton's modules on CPU tensors, which are moved if kernels run on the GPU here."""
    if interpreting():
        interpreter_bf16.install()
    return Implementation(function, "cpu" if interpreting() else "cuda", interpreting())


def each_dtype(params: list[Any]) -> list[Any]:
    """pytest parameters (implementation, dtype): each with the dtypes that it computes."""
    return [
        pytest.param(p.values[0], dtype, id=f"{p.id}-{DTYPE_NAMES[dtype]}", marks=p.marks)
        for p in params
        for dtype in p.values[0].dtypes
    ]


def assert_rounds_to(actual: Tensor, exact: Tensor, ulps: float = 0.5, tolerance: float = 1e-5) -> None:
    """``actual`` is ``exact`` (fp32) rounded to its dtype: within ``ulps`` bf16 units beside an fp32 tolerance."""
    assert actual.shape == exact.shape
    unit = 0.0 if actual.dtype == torch.float32 else 2.0**-7 * ulps
    error = (actual.float() - exact).abs()
    allowed = exact.abs() * (unit + tolerance) + tolerance
    assert torch.isfinite(actual).all()
    assert (error <= allowed).all(), f"largest excess {(error - allowed).max().item():.3g}"


def some_sinks(heads: int) -> Tensor:
    """Of attention, fp32 ``[heads]``: about as large as scores, far larger, as good as none, none."""
    return torch.tensor([1.5, 30.0, -30.0, -torch.inf, 0.0, 4.0, -3.0]).repeat(-(-heads // 7))[:heads]


def assert_close_by_head(actual: Tensor, wanted: Tensor) -> None:
    """``[N, heads, D]``; errors are of the size of a head's largest result, however small that is."""
    largest = wanted.abs().amax((0, 2))
    assert ((actual - wanted).abs().amax((0, 2)) <= 1e-5 * largest).all()


def strided_rows(x: Tensor) -> Tensor:
    """The same values as a view of a wider tensor: rows are contiguous but lie apart, with NaN between."""
    flat = x.flatten(1)
    wide = torch.full((x.shape[0], flat.shape[1] + 24), torch.nan, dtype=x.dtype)
    wide[:, 8 : 8 + flat.shape[1]] = flat
    return wide[:, 8 : 8 + flat.shape[1]].unflatten(1, x.shape[1:])


@dataclass(frozen=True)
class Paged:
    """A paged KV cache in which everything that must not be read is poison."""

    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor


def paged(
    queries: Sequence[int], contexts: Sequence[int], heads: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> Paged:
    """Random keys and values. NaN in unused pages and slots; impossible page numbers past each table's end."""
    used = [-(-length // page_size) for length in contexts]
    tables = torch.full((len(contexts), max(used, default=0) + 2), -(2**31), dtype=torch.int32)
    tables[:, 1::2] = 2**31 - 1
    pages = torch.randperm(sum(used) + 3)
    caches = torch.full((2, len(pages), page_size, heads, head_dim), torch.nan)
    taken = iter(pages.tolist())
    for r, length in enumerate(contexts):
        for i in range(used[r]):
            page = next(taken)
            tables[r, i] = page
            live = min(page_size, length - i * page_size)
            caches[:, page, :live] = torch.randn(2, live, heads, head_dim)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    k, v = caches.to(dtype)
    return Paged(k, v, tables, starts, torch.tensor(contexts, dtype=torch.int32))


def sampling(
    n: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int | None = None
) -> SamplingTensors:
    """The same parameters for n rows; seeds 0 to n - 1 unless one is given."""
    seeds = torch.arange(n) if seed is None else torch.full((n,), seed)
    return SamplingTensors(
        torch.full((n,), temperature),
        torch.full((n,), top_k, dtype=torch.int32),
        torch.full((n,), top_p),
        torch.full((n,), min_p),
        seeds,
    )


def mixed_sampling(n: int) -> SamplingTensors:
    """Greedy and sampled rows, each cut on for about half of them, seeds over all 64 bits."""

    def maybe(on: Tensor, off: float) -> Tensor:
        return torch.where(torch.rand(n) < 0.5, on.float(), off)

    return SamplingTensors(
        maybe(torch.rand(n) * 1.5 + 0.1, 0.0),
        maybe(torch.randint(1, 60, (n,)), 0).int(),
        maybe(torch.rand(n) * 0.9 + 0.05, 1.0),
        maybe(torch.rand(n) * 0.2, 0.0),
        torch.randint(-(2**63), 2**63 - 1, (n,)),
    )


def padded_logits(n: int, vocab_size: int, width: int, dtype: torch.dtype, poison: float) -> Tensor:
    logits = (torch.randn(n, width) * 3).to(dtype)
    logits[:, vocab_size:] = poison
    return logits


def assert_frequencies(counts: Tensor, expected: Tensor) -> None:
    """Draws fall on each value as often as they should, by a chi-square test."""
    stats = pytest.importorskip("scipy.stats", reason="frequencies are judged by scipy's chi-square test")
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def decided(
    logits: Tensor, params: SamplingTensors, positions: Tensor, vocab_size: int, stream: Stream = Stream.SAMPLE
) -> Tensor:
    """Rows whose draw does not hang on rounding: the best score leads by more than 1e-4."""
    scores = log_probabilities(logits, params, vocab_size) + gumbel(params.seed, positions, stream, vocab_size)
    best = scores.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] > 1e-4
    assert clear.float().mean() > 0.95
    return clear


def reference_result(op: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(reference, op)(*args, **kwargs)

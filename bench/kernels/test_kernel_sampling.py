"""sample and verify on the vocabularies of Llama 3 and Qwen, beside the same in torch: softmax, cuts, multinomial."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.kernels.kernel_bench import Bench, Call, Contender, rival
from pearl_kernels import Sampled, SamplingTensors, Stream, Verdict, reference
from pearl_kernels.reference.philox import gumbel
from pearl_kernels.reference.sampling import log_probabilities

TEMPERATURE = 0.8
CUTS = {"plain": (0, 1.0), "top-k": (50, 1.0), "top-p": (0, 0.9)}  # top_k, top_p


@dataclass(frozen=True)
class Draw:
    rows: int
    vocab_size: int
    cut: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocab_size} {self.cut}"


@dataclass(frozen=True)
class Windows:
    """``rows`` of each request: drafted tokens, and a bonus row."""

    requests: int
    rows: int
    vocab_size: int
    rule: str

    def __str__(self) -> str:
        return f"{self.requests}x{self.rows}x{self.vocab_size} {self.rule}"


DRAWS = {
    "tiny": [Draw(3, 130, "top-k")],
    "small": [Draw(rows, 32000, cut) for rows in (1, 9) for cut in CUTS],
    "real": [Draw(rows, v, cut) for v in (128256, 151936) for rows in (1, 9, 72) for cut in CUTS],
}
WINDOWS = {
    "tiny": [Windows(3, 4, 130, rule) for rule in ("rejection", "coupled")],
    "small": [Windows(requests, 9, 32000, rule) for requests in (1, 4) for rule in ("rejection", "coupled")],
    "real": [
        Windows(requests, 9, v, rule)
        for v in (128256, 151936)
        for requests in (1, 8)
        for rule in ("rejection", "coupled")
    ],
}


def parameters(n: int, device: str, top_k: int = 0, top_p: float = 1.0) -> SamplingTensors:
    def full(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((n,), value, dtype=dtype, device=device)

    return SamplingTensors(
        full(TEMPERATURE, torch.float32), full(top_k, torch.int32), full(top_p, torch.float32),
        full(0.0, torch.float32), torch.arange(n, device=device),
    )  # fmt: skip


def torch_sample(logits: Tensor, params: SamplingTensors, positions: Tensor, vocab_size: int) -> Call:
    """What is cut is known to the host, so that nothing is computed in vain."""
    top_k, top_p = int(params.top_k[0]), float(params.top_p[0])
    temperature = params.temperature[:, None]

    def plain() -> Tensor:
        return (logits.float() / temperature).softmax(-1).multinomial(1)

    def cut_by_k() -> Tensor:
        values, tokens = logits.float().topk(top_k)
        return tokens.gather(1, (values / temperature).softmax(-1).multinomial(1))

    def cut_by_p() -> Tensor:
        p, tokens = (logits.float() / temperature).softmax(-1).sort(descending=True)
        return tokens.gather(1, p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0).multinomial(1))

    return cut_by_k if top_k else cut_by_p if top_p < 1 else plain


def torch_verify(
    logits: Tensor,
    draft_tokens: Tensor,
    row_start: Tensor,
    positions: Tensor,
    params: SamplingTensors,
    vocab_size: int,
    rule: str,
    draft_logprobs: Tensor,
    draft_logits: Tensor,
    draft_rows: Tensor,
    draft_temperature: Tensor,
) -> Call:
    """All windows at once, as eager code does it: each row's residual, also of rows that are not reached."""
    requests = len(row_start) - 1
    drafted = draft_tokens.view(requests, -1)[:, :-1, None]

    def call() -> tuple[Tensor, Tensor]:
        p = (logits.float() / TEMPERATURE).softmax(-1).unflatten(0, (requests, -1))  # type: ignore[no-untyped-call]
        if rule == "coupled":
            drawn = p.flatten(0, 1).multinomial(1).view(requests, -1)
            accepted = (drawn[:, :-1] == drafted[..., 0]).int().cumprod(1).sum(1)
            return accepted, drawn.gather(1, accepted[:, None])
        q = (draft_logits.float() / TEMPERATURE).softmax(-1).unflatten(0, (requests, -1))  # type: ignore[no-untyped-call]
        ratio = (p[:, :-1].gather(-1, drafted) / q.gather(-1, drafted))[..., 0]
        accepted = (torch.rand_like(ratio) < ratio).int().cumprod(1).sum(1)
        p[:, :-1].sub_(q).clamp_(min=0)
        chosen = p.gather(1, accepted[:, None, None].expand(-1, 1, p.shape[-1]))[:, 0]
        return accepted, chosen.multinomial(1)

    return call


def same_draws(result: Sampled, expected: Sampled, mine: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    """The drawn token scores the best, up to rounding."""
    logits, params, positions, vocab_size = theirs
    scores = log_probabilities(logits, params, vocab_size) + gumbel(params.seed, positions, Stream.SAMPLE, vocab_size)
    best = scores.amax(-1)
    torch.testing.assert_close(scores.gather(1, result.tokens[:, None])[:, 0], best, rtol=0, atol=1e-3)
    same = result.tokens == expected.tokens
    torch.testing.assert_close(result.logprobs[same], expected.logprobs[same], rtol=1e-3, atol=1e-3)


def same_verdicts(result: Verdict, expected: Verdict, *_: Any) -> None:
    """One request in eight may differ: where rounding decides."""
    same = (result.accepted == expected.accepted) & (result.next_token == expected.next_token)
    assert (~same).sum() <= len(same) // 8


@pytest.mark.kernel("sample", shapes=DRAWS, rivals=[rival("softmax, multinomial", torch_sample, capturable=False)])
def test_sample(bench: Bench, shape: Draw, contender: Contender) -> None:
    def make() -> tuple[Any, ...]:
        logits = (torch.randn(shape.rows, shape.vocab_size, device=bench.device) * 3).to(bench.dtype)
        params = parameters(shape.rows, bench.device, *CUTS[shape.cut])
        return logits, params, torch.arange(shape.rows, device=bench.device), shape.vocab_size

    moved = shape.rows * (shape.vocab_size * bench.dtype.itemsize + 12)
    agree = same_draws if contender.role == "provider" else None
    bench.measure(contender, "sample", shape, make, moved, agree)


@pytest.mark.kernel("verify", shapes=WINDOWS, rivals=[rival("softmax, multinomial", torch_verify, capturable=False)])
def test_verify(bench: Bench, shape: Windows, contender: Contender) -> None:
    torch.manual_seed(shape.requests)
    call = drafted_windows(bench, shape)
    # The least that must move: each row up to the one that decides, and the draft's row of a rejected token.
    verdict = reference.verify(*call)
    reached = int((verdict.accepted + 1).clamp(max=shape.rows).sum())
    rejected = int((verdict.accepted < shape.rows - 1).sum()) if shape.rule == "rejection" else 0
    moved = (reached + rejected) * shape.vocab_size * bench.dtype.itemsize
    agree = same_verdicts if contender.role == "provider" else None
    bench.measure(contender, "verify", shape, lambda: call, moved, agree)


def drafted_windows(bench: Bench, shape: Windows) -> tuple[Any, ...]:
    """Arguments of ``verify`` with a draft close to the target, so that most tokens are accepted."""
    n, device = shape.requests * shape.rows, bench.device
    logits = (torch.randn(n, shape.vocab_size, device=device) * 3).to(bench.dtype)
    drafts = torch.arange(n, device=device) % shape.rows < shape.rows - 1
    draft_logits = (
        logits[drafts].float() + 0.1 * torch.randn(len(logits[drafts]), shape.vocab_size, device=device)
    ).to(bench.dtype)
    positions = torch.arange(n, device=device)
    params = parameters(shape.requests, device)
    each = SamplingTensors(*(getattr(params, f).repeat_interleave(shape.rows) for f in params.__dataclass_fields__))
    stream = Stream.SAMPLE if shape.rule == "coupled" else Stream.DRAFT
    drawn = reference.sample(draft_logits, each[drafts], positions[drafts], shape.vocab_size, stream)
    tokens, logprobs = torch.full((n,), -1, device=device), torch.zeros(n, device=device)
    rows = torch.full((n,), -1, dtype=torch.int32, device=device)
    tokens[drafts], logprobs[drafts] = drawn.tokens, drawn.logprobs
    rows[drafts] = torch.arange(len(draft_logits), dtype=torch.int32, device=device)
    start = torch.arange(shape.requests + 1, dtype=torch.int32, device=device) * shape.rows
    return (
        logits, tokens, start, positions, params, shape.vocab_size, shape.rule, logprobs, draft_logits, rows,
        params.temperature,
    )  # fmt: skip

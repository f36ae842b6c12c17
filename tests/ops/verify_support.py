"""Batches for ``verify``, and what its verdicts on them are compared with."""

from __future__ import annotations

from typing import Any

import torch
from ops_support import Implementation, decided, mixed_sampling, padded_logits, strided_rows
from torch import Tensor

from pearl_kernels import SamplingTensors, reference
from pearl_kernels.reference import Rule, Stream, Verdict, verification
from pearl_kernels.reference.philox import gumbel, uniform
from pearl_kernels.reference.sampling import log_probabilities

Case = dict[str, Any]  # verify's arguments by name


def requests_of(case: Case) -> Tensor:
    """The request of each row."""
    starts = case["row_start"].long()
    return torch.arange(len(starts) - 1).repeat_interleave(starts.diff())


def drafter_of(case: Case) -> SamplingTensors:
    p = case["params"]
    return SamplingTensors(case["draft_temperature"], p.top_k, p.top_p, p.min_p, p.seed)


def ragged(
    rule: Rule,
    vocab_size: int,
    dtype: torch.dtype,
    q_dtype: torch.dtype,
    requests: int = 44,
    known: int | None = None,
    apart: float = 0.5,
) -> Case:
    """Requests of 0 to 9 rows, half of them with a bonus row, drafted by a model that resembles the target.

    ``known``: tokens that this model gives a probability; None: all. ``apart``: how far its logits are from the
    target's.
    """
    sizes = torch.cat((torch.tensor([0, 1, 9, 0]), torch.randint(0, 10, (requests - 4,))))
    starts = torch.cat((torch.zeros(1), sizes.cumsum(0))).int()
    n = int(starts[-1])
    logits = padded_logits(n, vocab_size, vocab_size + 5, dtype, torch.nan)
    draft_rows = torch.randperm(n + 7)[:n].int()
    draft_logits = padded_logits(n + 7, vocab_size, vocab_size + 70, q_dtype, torch.inf)
    noisy = logits[:, :vocab_size].float() + apart * torch.randn(n, vocab_size)
    draft_logits[draft_rows, :vocab_size] = noisy.to(draft_logits.dtype)
    draft_logits[:, known or vocab_size : vocab_size] = -torch.inf
    params = mixed_sampling(len(sizes))
    temperature = torch.where(torch.rand(len(sizes)) < 0.2, 0.0, params.temperature * 0.8 + 0.1)
    case: Case = {"params": params, "row_start": starts, "draft_temperature": temperature}
    request = requests_of(case)
    positions = torch.randint(0, 2**31, (len(sizes),))[request] + torch.arange(n)
    stream = Stream.SAMPLE if rule == "coupled" else Stream.DRAFT
    drafted = reference.sample(draft_logits[draft_rows], drafter_of(case)[request], positions, vocab_size, stream)
    point = torch.rand(n) < 0.25  # as from n-grams: any token, with certainty
    tokens = torch.where(point, noisy.argmax(-1), drafted.tokens)
    bonus = (starts[1:] - 1)[(sizes > 0) & (torch.arange(len(sizes)) % 2 == 0)].long()
    tokens[bonus] = -1
    case |= {"logits": strided_rows(logits), "draft_logits": strided_rows(draft_logits), "draft_tokens": tokens}
    case |= {"draft_logprobs": torch.where(point, 0.0, drafted.logprobs), "positions": positions, "rule": rule}
    return case | {"draft_rows": torch.where(point, -1, draft_rows), "vocab_size": vocab_size}


def acceptance_rows(case: Case) -> Tensor:
    """Rows whose token the acceptance test of the rejection rule decides, if they are reached."""
    sampled = case["params"].temperature[requests_of(case)] > 0
    return (case["draft_tokens"] >= 0) & sampled & (case["rule"] == "rejection")


def decided_requests(case: Case, accepted: Tensor) -> Tensor:
    """Requests none of whose reached rows hangs on rounding, for the reference's counts of accepted tokens."""
    if case["rule"] == "block":
        return decided_blocks(case, accepted)
    request, vocab_size, positions = requests_of(case), case["vocab_size"], case["positions"]
    params, drafted = case["params"][request], case["draft_tokens"].clamp(min=0)[:, None]
    p = log_probabilities(case["logits"], params, vocab_size).exp()
    draft_logits = case["draft_logits"][case["draft_rows"].clamp(min=0)]
    q = log_probabilities(draft_logits, drafter_of(case)[request], vocab_size).exp()
    q = torch.where(case["draft_rows"][:, None] < 0, torch.zeros_like(q).scatter(1, drafted, 1.0), q)
    u = uniform(params.seed, positions, Stream.ACCEPT)
    ratio = p.gather(1, drafted)[:, 0] / case["draft_logprobs"].exp()
    residual = (p - q).clamp(min=0)
    noise, error = gumbel(params.seed, positions, Stream.RESIDUAL, vocab_size), 1e-5 * (p + q)
    winner = (residual.log() + noise).argmax(-1, keepdim=True)
    lowest = (residual - error).clamp(min=0).log() + noise
    others = ((residual + error).log() + noise).scatter(1, winner, -torch.inf).amax(-1)
    replaced = lowest.gather(1, winner)[:, 0] > others
    drawn = decided(case["logits"], params, positions, vocab_size)
    clear = torch.where(acceptance_rows(case), ((u - ratio).abs() > 1e-4) & ((u < ratio) | replaced), drawn)
    reached = torch.arange(len(request)) <= (case["row_start"][:-1] + accepted)[request]
    unclear = torch.zeros(len(accepted)).index_add(0, request, (reached & ~clear).float())
    assert (unclear == 0).float().mean() >= 0.95
    return unclear == 0


def decided_blocks(case: Case, accepted: Tensor) -> Tensor:
    """As ``decided_requests``, of blocks: every token has a say in them."""
    params, starts, clear = case["params"], case["row_start"].tolist(), []
    alone = decided_requests(case | {"rule": "rejection"}, accepted)  # greedy requests, and bonus rows
    for r, held in enumerate(accepted.tolist()):
        begin, end = starts[r], starts[r + 1]
        if params.temperature[r] <= 0 or begin == end:
            clear.append(bool(alone[r]))
            continue
        rows = rows_of(case, r)
        last = end - int(case["draft_tokens"][end - 1] < 0)
        weights, shares = block_shares(rows, begin, last)
        margins = [abs(rows.u(row).item() - share) for row, share in zip(range(begin, last), shares, strict=True)]
        row, sure = begin + held, min(margins, default=1.0) > 1e-4
        if row < last:
            residual = rows.residual(row, weights[held])
            noise = gumbel(rows.params.seed, case["positions"][row : row + 1], Stream.RESIDUAL, len(residual))[0]
            best = torch.cat(((residual.log() + noise), torch.full((2,), -torch.inf))).topk(2).values
            sure &= bool(best[0] - best[1] > 1e-3) and bool(residual[(residual.log() + noise).argmax()] > 1e-4)
        elif row < end:
            here = slice(row, row + 1)
            scores = log_probabilities(case["logits"][here], rows.params, case["vocab_size"])
            scores += gumbel(rows.params.seed, case["positions"][here], Stream.SAMPLE, case["vocab_size"])
            best = scores[0].topk(2).values
            sure &= bool(best[0] - best[1] > 1e-4)
        clear.append(sure)
    assert sum(clear) >= 0.9 * len(clear)
    return torch.tensor(clear)


def rows_of(case: Case, request: int) -> verification._Rows:
    """The reference's own view of a request."""
    drafted = verification._Drafted(
        *(case[f"draft_{name}"] for name in ("tokens", "logprobs", "logits", "rows", "temperature"))
    )
    params = case["params"][torch.tensor([request])]
    return verification._Rows(request, params, case["logits"], case["positions"], case["vocab_size"], drafted)


def block_shares(rows: verification._Rows, begin: int, last: int) -> tuple[list[float], list[float]]:
    """The weights of 0, 1, .. tokens of a block, and with which probability each of 1, 2, .. is accepted."""
    weights = [1.0]
    for row in range(begin, last):
        weights.append(min(1.0, max(0.0, weights[-1] * rows.ratio(row).nan_to_num(0.0).item())))
    shares = [rows.share(row + 1, weights[row + 1 - begin], row + 1 < last) for row in range(begin, last)]
    return weights, shares


def check(verify: Implementation, case: Case) -> None:
    expected = reference.verify(**case)
    accepted, next_token = verify(**case)
    assert (accepted.dtype, next_token.dtype) == (torch.int32, torch.int64)
    clear = decided_requests(case, expected.accepted)
    assert torch.equal(accepted[clear], expected.accepted[clear])
    assert torch.equal(next_token[clear], expected.next_token[clear])
    sizes = case["row_start"].diff()  # the inputs reach every outcome
    assert ((expected.accepted == sizes) & (expected.next_token < 0))[sizes > 1].any()
    assert (expected.accepted == 0)[sizes > 1].any()
    assert ((expected.accepted > 0) & (expected.accepted < sizes - 1)).any()
    assert (case["draft_tokens"] < 0)[case["row_start"][1:][expected.accepted == sizes - 1].long() - 1].any()


def assert_same(ours: Verdict, expected: Verdict) -> None:
    assert torch.equal(ours.accepted, expected.accepted)
    assert torch.equal(ours.next_token, expected.next_token)


def one_row_each(logits: Tensor, params: SamplingTensors, tokens: Tensor, **draft: Any) -> Case:
    """Each request tests one token, at position 10; unless given, the draft was certain of it."""
    n = len(tokens)
    defaults = {"draft_logprobs": torch.zeros(n), "draft_rows": torch.full((n,), -1, dtype=torch.int32)}
    starts, positions = torch.arange(n + 1, dtype=torch.int32), torch.full((n,), 10)
    case: Case = {"logits": logits, "draft_tokens": tokens, "row_start": starts, "positions": positions}
    return case | {"params": params, "vocab_size": logits.shape[1]} | defaults | draft

"""Reference of ``sample``: the distributions of the engine, and draws from them.

A request's distribution over the V logits of a row is ``softmax(logits / temperature)`` cut to the tokens whose
scaled logit reaches one cutoff, the largest that top-k, top-p and min-p ask for, and renormalised. Temperature 0 is
the point mass on the (first) largest logit. Columns at or past ``vocab_size`` are padding and have no probability; nor
has a NaN. All arithmetic is in fp32, whatever the logits' dtype.

A row without a finite logit, or with an infinite one, is no distribution: token 0 is drawn, with log-probability NaN
(at temperature 0 the infinite one, if there is one, else token 0). A draft's row that is none counts as q = 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pearl_kernels.reference.philox import Stream, gumbel

MOST_ALTERNATIVES = 8  # that `sample` gives


@dataclass(frozen=True)
class SamplingTensors:
    """Sampling parameters, one entry per row (``sample``) or per request (``verify``), on the logits' device.

    temperature fp32, 0 or so large that logits / temperature are finite; top_k int32, 0 = off; top_p fp32 in (0, 1],
    1 = off; min_p fp32 in [0, 1], 0 = off; seed int64 (any 64-bit pattern).
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor

    @functools.cached_property
    def layout(self) -> tuple[torch.device, int] | None:
        """Device and number of entries, if the tensors are as described and contiguous; looked at once."""
        device, n = self.seed.device, self.seed.numel()
        dtypes = torch.float32, torch.int32, torch.float32, torch.float32, torch.int64
        as_described = all(
            t.dtype is dtype and t.shape == (n,) and t.device == device and t.is_contiguous()
            for t, dtype in zip(self._tensors, dtypes, strict=True)
        )
        return (device, n) if as_described else None

    @functools.cached_property
    def addresses(self) -> tuple[int, int, int, int, int]:
        """Of the five tensors, for kernels that take addresses."""
        temperature, top_k, top_p, min_p, seed = (t.data_ptr() for t in self._tensors)
        return temperature, top_k, top_p, min_p, seed

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.temperature, self.top_k, self.top_p, self.min_p, self.seed

    def __getitem__(self, rows: Tensor) -> SamplingTensors:
        return SamplingTensors(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], self.seed[rows]
        )


class Alternatives(NamedTuple):
    """The m tokens that come next after each row's drawn one, best first: -1 and -inf past the row's last."""

    tokens: Tensor  # int64 [N, m]
    scores: Tensor  # fp32 [N, m], see ``sample``
    drawn: Tensor  # fp32 [N], the drawn token's on the same scale; NaN where the row is no distribution


class Sampled(NamedTuple):
    tokens: Tensor  # int64 [N]
    logprobs: Tensor  # fp32 [N], of the drawn token under the row's (cut, renormalised) distribution
    alternatives: Alternatives | None = None  # where they were asked for


def log_probabilities(logits: Tensor, params: SamplingTensors, vocab_size: int) -> Tensor:
    """fp32 ``[N, vocab_size]`` log-probabilities of the rows' distributions, -inf for excluded tokens.

    top-k keeps every token that ties with the k-th; top-p then keeps the smallest set of most likely tokens whose
    mass, after top-k, reaches top_p, and what ties with its last member; min-p keeps p >= min_p * max(p).
    """
    greedy = params.temperature <= 0
    z = logits[:, :vocab_size].float()
    z = z.masked_fill(z.isnan(), -torch.inf) / params.temperature.masked_fill(greedy, 1.0)[:, None]
    z = z - z.amax(-1, keepdim=True)
    descending = z.sort(-1, descending=True).values
    k = torch.where(params.top_k > 0, params.top_k.clamp(max=vocab_size), vocab_size).long()
    cutoff = descending.gather(1, (k - 1)[:, None])
    mass = torch.where(descending >= cutoff, descending.exp(), 0.0)
    before = mass.double().cumsum(-1) - mass  # of the more likely tokens; the first always stays
    needed = (before < params.top_p[:, None].double() * mass.double().sum(-1, keepdim=True)) & (descending >= cutoff)
    last = needed.sum(-1, keepdim=True).clamp(min=1) - 1
    cutoff = torch.where((params.top_p < 1)[:, None], descending.gather(1, last), cutoff)
    cutoff = torch.maximum(cutoff, params.min_p.log()[:, None])
    result = z.masked_fill(z < cutoff, -torch.inf).log_softmax(-1)
    point = torch.full_like(result, -torch.inf).scatter_(1, z.argmax(-1, keepdim=True), 0.0)
    return torch.where(greedy[:, None], point, result)


def sample(
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor,
    vocab_size: int,
    stream: Stream = Stream.SAMPLE,
    alternatives: int = 0,
) -> Sampled:
    """Gumbel-max draw from each row's distribution, keyed by (seed, position, stream, token).

    Args: logits ``[N, V]`` floating, V >= vocab_size; positions int64 ``[N]``, of the token being drawn.
    The draw is ``argmax(logits / T + gumbel)`` over the kept tokens: with one seed, two models whose distributions
    are close mostly draw the same token (Gumbel coupling, arXiv 2408.07978).

    alternatives: m in [0, 8]. For m > 0 also the m tokens that would most likely stand in the drawn one's place if a
    target rejected it, and how likely: candidates are the kept tokens but the drawn one (of a greedy row all with a
    probability at temperature 1), ranked by their scores, ties by the lower id:
        a greedy row: log-softmax of its logits at temperature 1, whatever the cuts;
        stream SAMPLE: log-probability + noise, of which the drawn token has the largest. A target that draws with the
            same noise most likely has its largest among the next ones;
        any other stream: log-probability, for then the replacement is drawn with noise of its own.
    In the first and last case scores of equal logits are equal, and the order is that of the logits, without rounding.
    A row that is no distribution has none.
    """
    log_p = log_probabilities(logits, params, vocab_size)
    noise = gumbel(params.seed, positions, stream, vocab_size)
    tokens = (log_p + noise).argmax(-1)
    logprobs = log_p.gather(1, tokens[:, None])[:, 0]
    if alternatives == 0:
        return Sampled(tokens, logprobs)
    raw = logits[:, :vocab_size].float()
    raw = raw.masked_fill(raw.isnan(), -torch.inf)
    greedy, perturbed = params.temperature <= 0, log_p + noise if stream == Stream.SAMPLE else log_p
    scores = torch.where(greedy[:, None], raw.log_softmax(-1), perturbed)
    rank = torch.where(greedy[:, None], raw, perturbed) if stream == Stream.SAMPLE else raw
    return Sampled(tokens, logprobs, _best_but(tokens, rank, scores, alternatives))


def _best_but(drawn: Tensor, rank: Tensor, scores: Tensor, count: int) -> Alternatives:
    """rank, scores: fp32 ``[N, V]``; a token whose score is not finite is no alternative."""
    own = scores.gather(1, drawn[:, None])
    rank = rank.masked_fill(~scores.isfinite(), -torch.inf).scatter(1, drawn[:, None], -torch.inf)
    rank = torch.nn.functional.pad(rank, (0, count), value=-torch.inf)  # so that there are count
    best, tokens = rank.sort(stable=True, dim=-1, descending=True)  # of equals the first comes first
    tokens = tokens[:, :count].masked_fill(best[:, :count] == -torch.inf, -1)
    values = scores.gather(1, tokens.clamp(min=0)).masked_fill(tokens < 0, -torch.inf)
    return Alternatives(tokens, values, own[:, 0])

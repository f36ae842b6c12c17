"""Reference of ``verify``: the three rules that decide about drafted tokens, each exact.

*Rejection* tests a token by itself (Leviathan et al. 2023, Chen et al. 2023). *Coupled* lets the target's own keyed
draw decide (arXiv 2408.07978). *Block* (Sun et al., ICLR 2025, arXiv 2403.10444) tests a request's tokens together.
With P and Q the target's and the draft's distributions after the first i tokens, p and q those of the token that
follows:

    w[0] = 1,  w[i + 1] = min(1, w[i] * p / q)               weight of the first i + 1 tokens
    s[i] = sum over the vocabulary of max(w[i] * P - Q, 0)
    h[i] = s[i] / (s[i] + 1 - w[i]) for 0 < i < n,  h[n] = w[n]
    accepted: the largest i with u[i] < h[i], else 0
    replacement of token i + 1: a draw from norm(max(w[i] * P - Q, 0))

*Why it is exact.* Of all that draft x[1..i], a share w[i] must end up with at least these i tokens. By induction from
the end: at n it is h[n] = w[n]; before, the share of those accepted further on is sum min(Q, w P) = w - s, and of the
rest, 1 - w + s, h accepts s, which makes w. So x[1..i] is what is committed, with more to come, as often as the
target says, and the replacement has just what the draft leaves over. *Where a block may end.* h[n] = w[n] needs nothing
of what comes after it: the block may end behind any token, if that is not decided by tokens of the block that are not
drawn yet. So every row of a request in a call is its block:

* a bonus row at the end is reached where the whole block is accepted, and is the target's own draw;
* PEARL's last row (post-verify) tests the first token of the window that is being drafted: it is simply the block's
  last one. The rest of that window is seen by nobody before the next call, which begins with w = 1: if all of a block
  was accepted, what follows is a new one, not the continuation of the old. A block that is cut, as PEARL cuts windows,
  or of a single token (pre-verify), accepts less than a longer one, but what it commits has the same distribution;
  with a block of one token the rule *is* the rejection rule, to the bit;
* greedy requests have point masses, for which all rules are one: accept the target's argmax.

*Noise.* A verdict that accepts i of n tokens has looked at tokens beyond i + 1 and at their u. Whoever drafts these
positions again must not use the noise of that verdict again, neither the draft's nor u: it would be noise of which it
is known that it failed. Under the other rules nothing after the first failure is looked at, so that noise may be keyed
by position alone.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pearl_kernels.reference.philox import Stream, gumbel, uniform
from pearl_kernels.reference.sampling import SamplingTensors, log_probabilities, sample

Rule = Literal["rejection", "coupled", "block"]


class Verdict(NamedTuple):
    accepted: Tensor  # int32 [R], drafted tokens accepted
    next_token: Tensor  # int64 [R], the replacement or bonus token; -1 when all were accepted and no bonus row stood


def verify(
    logits: Tensor,
    draft_tokens: Tensor,
    row_start: Tensor,
    positions: Tensor,
    params: SamplingTensors,
    vocab_size: int,
    rule: Rule = "rejection",
    draft_logprobs: Tensor | None = None,
    draft_logits: Tensor | None = None,
    draft_rows: Tensor | None = None,
    draft_temperature: Tensor | None = None,
) -> Verdict:
    """Decide how many of each request's drafted tokens hold, and what follows them.

    Args:
        logits: ``[N, V]`` target rows. Rows ``row_start[r]:row_start[r + 1]`` belong to request r (int32 ``[R + 1]``;
            a request may have none).
        draft_tokens: int64 ``[N]``, the token tested at each row; -1 marks a *bonus row*, only ever a request's last:
            if it is reached, its token is drawn from the target (stream SAMPLE).
        positions: int64 ``[N]``, the position of the token decided at each row.
        params: of the target, ``[R]``.
        rule: "coupled": the target's own draw decides (accept iff equal; the draw is the next token). "rejection":
            accept iff ``u < p(x) / q(x)``, strictly; else draw from ``norm(max(p - q, 0))``. "block": as above. Where
            a residual is zero everywhere, p is drawn from.
        draft_logprobs: fp32 ``[N]``, log q(x) as ``sample`` reported it; not read under "coupled".
        draft_logits: ``[Q, Vq]`` raw draft rows, Vq >= vocab_size. draft_rows: int32 ``[N]``, the row of draft_logits
            that each token was drawn from; -1 says that q was the point mass on the token (greedy or n-gram draft).
        draft_temperature: fp32 ``[R]``; q uses it with the request's top-k, top-p and min-p.
    A temperature of 0 accepts exactly the target's argmax, under all rules.
    """
    starts = row_start.tolist()
    accepted = torch.zeros(len(starts) - 1, dtype=torch.int32, device=logits.device)
    next_token = torch.full((len(starts) - 1,), -1, dtype=torch.int64, device=logits.device)
    drafted = _Drafted(draft_tokens, draft_logprobs, draft_logits, draft_rows, draft_temperature)
    for r, (begin, end) in enumerate(itertools.pairwise(starts)):
        rows = _Rows(r, params[torch.tensor([r], device=logits.device)], logits, positions, vocab_size, drafted)
        if rule == "block" and rows.params.temperature.item() > 0:
            accepted[r], next_token[r] = rows.judge_block(begin, end)
        else:
            accepted[r], next_token[r] = rows.judge_each(begin, end, rule)
    return Verdict(accepted, next_token)


@dataclass(frozen=True)
class _Drafted:
    tokens: Tensor
    logprobs: Tensor | None
    logits: Tensor | None
    rows: Tensor | None
    temperature: Tensor | None


@dataclass(frozen=True)
class _Rows:
    """The rows of one request."""

    request: int
    params: SamplingTensors
    logits: Tensor
    positions: Tensor
    vocab_size: int
    drafted: _Drafted

    def judge_each(self, begin: int, end: int, rule: Rule) -> tuple[int, int]:
        """Accepted tokens and next token, one row after the other."""
        for row in range(begin, end):
            token = int(self.drafted.tokens[row])
            if token < 0 or rule == "coupled" or self.params.temperature.item() <= 0:
                drawn = self.draw(row)
                if drawn != token:
                    return row - begin, drawn
            elif not self.u(row) < self.ratio(row):
                return row - begin, self.replacement(row, 1.0)
        return end - begin, -1

    def judge_block(self, begin: int, end: int) -> tuple[int, int]:
        """Accepted tokens and next token, of all rows together."""
        last = end - 1 if end > begin and self.drafted.tokens[end - 1] < 0 else end  # behind the tokens
        accepted, weights = begin, [1.0]
        for row in range(begin, last):
            weight = weights[-1] * self.ratio(row).item()
            weights.append(min(1.0, weight) if weight > 0 else 0.0)  # NaN: a token that the draft cannot have drawn
            if self.u(row) < self.share(row + 1, weights[-1], row + 1 < last):
                accepted = row + 1
        if accepted < last:
            return accepted - begin, self.replacement(accepted, weights[accepted - begin])
        return last - begin, self.draw(last) if last < end else -1

    def share(self, row: int, weight: float, goes_on: bool) -> float:
        """h of the tokens before ``row``. A row that is no distribution ends the block before it."""
        if not goes_on or self.log_p(row).isnan().any():
            return weight
        spare = self.residual(row, weight).sum().item()
        left = spare + 1.0 - weight
        return spare / left if left > 0 else 1.0

    def draw(self, row: int) -> int:
        here = slice(row, row + 1)
        return int(sample(self.logits[here], self.params, self.positions[here], self.vocab_size).tokens)

    def u(self, row: int) -> Tensor:
        return uniform(self.params.seed, self.positions[row : row + 1], Stream.ACCEPT)[0]

    def log_p(self, row: int) -> Tensor:
        return log_probabilities(self.logits[row][None], self.params, self.vocab_size)[0]

    def ratio(self, row: int) -> Tensor:
        assert self.drafted.logprobs is not None
        return torch.exp(self.log_p(row)[self.drafted.tokens[row]] - self.drafted.logprobs[row])

    def q(self, row: int) -> Tensor:
        """fp32 ``[vocab_size]``"""
        assert self.drafted.rows is not None
        index = int(self.drafted.rows[row])
        if index < 0:
            q = torch.zeros(self.vocab_size, device=self.logits.device)
            q[self.drafted.tokens[row]] = 1.0
            return q
        assert self.drafted.logits is not None
        assert self.drafted.temperature is not None
        drafter = replace(self.params, temperature=self.drafted.temperature[self.request : self.request + 1])
        return log_probabilities(self.drafted.logits[index][None], drafter, self.vocab_size)[0].exp()

    def residual(self, row: int, weight: float) -> Tensor:
        """fp32 ``[vocab_size]``: max(weight * P - Q, 0); nothing where the target's row is no distribution."""
        p, q = self.log_p(row).exp(), self.q(row).nan_to_num(0.0)
        return (weight * p - q).clamp(min=0).nan_to_num(0.0)

    def replacement(self, row: int, weight: float) -> int:
        residual = self.residual(row, weight)
        if not residual.any():
            residual = self.log_p(row).exp()
        noise = gumbel(self.params.seed, self.positions[row : row + 1], Stream.RESIDUAL, self.vocab_size)[0]
        return int((residual.log() + noise).argmax())

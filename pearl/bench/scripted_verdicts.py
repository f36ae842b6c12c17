"""Synthetic acceptance: real forwards and a real verification, whose verdicts are then replaced by scripted ones.

The speed of speculative decoding hangs on how often the target accepts the draft. Models with random weights never
agree, so a benchmark of their shapes says what it assumes: each tested token holds with the same probability.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from pearl.bench.options import check_rate
from pearl.engine.judge import Judge
from pearl.messages import Decision, DraftProposal, SchedulerOutput, TargetOutput, VerifyResult
from pearl_kernels.reference.philox import Stream, uniform

_BLOCK = 512  # positions whose draws are made at once


def scripted(rate: float, vocab_size: int) -> Callable[[Judge], Judge]:
    """``wrap_verifier`` of ``LLM.from_models``. ConfigurationError unless ``rate`` lies in (0, 1]."""
    check_rate(rate)
    return functools.partial(ScriptedVerifier, rate=rate, vocab_size=vocab_size)


class ScriptedVerifier:
    """Accepts each tested token with probability ``rate``, independently.

    The draw depends on the request's seed and the token's position only: a run comes out the same whatever the batch,
    and methods meet the same luck. Requests must have different seeds to be independent of each other.
    Where the script takes another turn than the real verdict, logprobs are lost.
    """

    def __init__(self, verifier: Judge, rate: float, vocab_size: int) -> None:
        self._verifier, self._rate, self._vocab_size = verifier, rate, vocab_size
        self._draws: dict[tuple[int, int], list[float]] = {}  # by seed and block: a round may not pay for making them

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        result = self._verifier.verify(plan, proposal, target)
        forwards = {work.state.request_id: work for work in plan.target.work}
        decisions = dict(result.decisions)
        for work in plan.verify:
            real, forward = decisions[work.request_id], forwards[work.request_id]
            held = self._held(forward.state.seed, work.position, len(real.tested))
            # A row more than tokens is a bonus row.
            has_bonus = forward.end + 1 - work.position > len(real.tested)
            decisions[work.request_id] = self._script(real, held, has_bonus)
        return replace(result, decisions=decisions)

    def _held(self, seed: int, position: int, count: int) -> int:
        """How many of ``count`` tokens hold, from the first one at ``position`` on."""
        return next((i for i in range(count) if self._draw(seed, position + i) >= self._rate), count)

    def _script(self, real: Decision, held: int, has_bonus: bool) -> Decision:
        if held == real.accepted:
            return real
        token = real.next_token
        if held == len(real.tested):
            # The real verdict stopped earlier, at a correction: as good a token as the bonus it did not draw.
            return Decision(real.tested, held, token if has_bonus else None, None)
        if token is None:
            token = (real.tested[held] + 1) % self._vocab_size
        return Decision(real.tested, held, token, None)

    def _draw(self, seed: int, position: int) -> float:
        block, index = divmod(position, _BLOCK)
        if (seed, block) not in self._draws:
            positions = torch.arange(block * _BLOCK, (block + 1) * _BLOCK)
            key = torch.tensor(seed - 2**64 if seed >= 2**63 else seed)
            self._draws[seed, block] = uniform(key, positions, Stream.ACCEPT).tolist()
        return self._draws[seed, block][index]

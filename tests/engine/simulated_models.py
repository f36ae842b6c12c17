"""Simulated models over simulated KV pages, and what the target says.

The simulated target is a function of the whole prefix, which it reads from its pages alone: a page that holds anything
else than the sequence is found at the first forward that reads it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence

import torch
from engine_requests import EOS, PieceDetokenizer, drafted
from paged_memory import PagedMemory

from pearl.engine.output_processor import OutputProcessor
from pearl.messages import (
    Branch,
    Decision,
    Drafted,
    DraftPlan,
    DraftProposal,
    DraftWork,
    ForwardWork,
    Ranked,
    SchedulerOutput,
    TargetOutput,
    TargetPlan,
    VerifyResult,
)
from pearl.sampling_params import SamplingParams

VOCAB = 29


def target_token(prefix: Sequence[int]) -> int:
    """The token that the simulated target puts after ``prefix``."""
    return zlib.crc32(bytes(prefix)) % VOCAB


def expected_output(
    prompt: Sequence[int], max_tokens: int, params: SamplingParams | None = None
) -> tuple[list[int], str, str | None]:
    """Tokens, text and finish reason that a request must return: token by token, text at once."""
    output = OutputProcessor(PieceDetokenizer(), params or SamplingParams(max_tokens=max_tokens), max_tokens, (EOS,))
    tokens, text, reason = list[int](), "", None
    while reason is None:
        tokens.append(target_token([*prompt, *tokens]))
        _, piece, reason = output.text(tokens[-1:], output.end(tokens[-1:]))
        text += piece
    return tokens, text, reason


def target_sequence(prompt: Sequence[int], max_tokens: int, eos_ids: Collection[int] = (EOS,)) -> list[int]:
    """What a request must return: the target's own tokens up to EOS or max_tokens."""
    output: list[int] = []
    while len(output) < max_tokens and not (output and output[-1] in eos_ids):
        output.append(target_token([*prompt, *output]))
    return output


Truth = Callable[[int], list[int]]  # committed + pending tokens of a request


def compute(memory: PagedMemory, work: Sequence[ForwardWork], truth: Truth) -> list[list[int]]:
    """One ragged forward: everything is written, then everything is read. Returns each item's whole prefix."""
    for item in work:
        assert item.tokens, item
        assert item.num_logits <= len(item.tokens), item
        memory.write(item.block_table, item.start, item.tokens)
    prefixes = [memory.read(item.block_table, item.end) for item in work]
    for item, prefix in zip(work, prefixes, strict=True):
        assert prefix == truth(item.state.request_id)[: item.end]
    return prefixes


class SimulatedTarget:
    """``TargetRunner``'s interface; ``logits`` are simply the target's token for each wanted row."""

    def __init__(self, memory: PagedMemory, truth: Truth) -> None:
        self._memory, self._truth = memory, truth

    def run(self, plan: TargetPlan) -> TargetOutput:
        self._memory.copy(plan.copies)
        rows: list[int] = []
        for item, prefix in zip(plan.work, compute(self._memory, plan.work, self._truth), strict=True):
            first = len(prefix) - item.num_logits + 1
            rows.extend(target_token(prefix[:end]) for end in range(first, first + item.num_logits))
        return TargetOutput(torch.tensor(rows, dtype=torch.int64))

    def check(self) -> None:
        pass


class SimulatedDrafter:
    """Right with probability ``accuracy``; ``moody`` also makes it propose fewer tokens than asked, or none."""

    prepares = True
    hidden_layers: tuple[int, ...] = ()
    most_behind = 2

    def __init__(self, memory: PagedMemory | None, truth: Truth, accuracy: float, moody: bool) -> None:
        self._memory, self._truth = memory, truth
        self._accuracy, self._moody = accuracy, moody
        self.reads_history = memory is None

    def waits(self, plan: DraftPlan) -> bool:
        return False

    def propose(self, plan: DraftPlan) -> DraftProposal:
        if self._memory is not None:
            self._memory.copy(plan.copies)
            compute(self._memory, [item.forward for item in plan.work], self._truth)
            for item in plan.work:
                for branch in item.branches:
                    if branch.token is not None:
                        self._compute(branch.block_table, self._before(item, branch), branch.token)
        windows, prepared = {}, {}
        for item in plan.work:
            texts = self._truth(item.forward.state.request_id)
            windows[item.forward.state.request_id] = self._draft(texts, item.num_draft, plan.alternatives)
        if self._memory is not None:
            self._memory.copy(plan.late_copies)
        for item in plan.work:
            request_id, table = item.forward.state.request_id, item.forward.block_table
            self._write(self._truth(request_id), windows[request_id], table)
            for branch in item.branches:
                prepared[branch.id] = self._prepare(item, branch, windows[request_id], plan.alternatives)
        steps = max((item.num_draft for item in plan.work), default=0)
        return DraftProposal(windows, steps=steps, prepared=prepared)

    def _before(self, item: DraftWork, branch: Branch) -> list[int]:
        text = self._truth(item.forward.state.request_id)
        assert branch.start <= len(text)
        return text[: branch.start]

    def _prepare(
        self, item: DraftWork, branch: Branch, window: tuple[Drafted, ...], alternatives: int
    ) -> tuple[Drafted, ...]:
        before, token = self._before(item, branch), branch.token
        if token is None:
            ranked = window[0].ranked if window else None
            if ranked is None or branch.rank >= len(ranked.tokens):
                return ()
            token = ranked.tokens[branch.rank]
            if self._memory is not None:
                self._compute(branch.block_table, before, token)
        text = [*before, token]
        own = self._draft(text, branch.num_draft, alternatives)
        self._write(text, own, branch.block_table)
        return (*drafted(token), *own)

    def _draft(self, text: list[int], wanted: int, alternatives: int) -> tuple[Drafted, ...]:
        text, window = list(text), []
        for _ in range(self._count(text, wanted)):
            token = self.guess(text)
            near = [(target_token(text) + i) % VOCAB for i in (0, 1, 2, 5)]
            others = tuple([other for other in near if other != token][:alternatives])
            ranked = Ranked(-0.5, others, tuple([-1.5 - i for i in range(len(others))])) if alternatives else None
            window.append(Drafted(token, 0.0, -1, ranked))
            text.append(token)
        return tuple(window)

    def _write(self, before: list[int], window: tuple[Drafted, ...], table: Sequence[int]) -> None:
        """What drafting a window computes: all but its last token."""
        text = list(before)
        for drafted_token in window[:-1] if self._memory is not None else ():
            self._compute(table, text, drafted_token.token)
            text.append(drafted_token.token)

    def _compute(self, table: Sequence[int], before: list[int], token: int) -> None:
        assert self._memory is not None
        self._memory.write(table, len(before), [token])
        assert self._memory.read(table, len(before) + 1) == [*before, token]

    def guess(self, prefix: Sequence[int]) -> int:
        right = zlib.crc32(bytes(prefix), 1) % 1000 < 1000 * self._accuracy
        return (target_token(prefix) + (not right)) % VOCAB

    def _count(self, prefix: Sequence[int], wanted: int) -> int:
        return min(wanted, zlib.crc32(bytes(prefix), 2) % (wanted + 1)) if self._moody else wanted


class SimulatedVerifier:
    """The greedy rule, written out: pending tokens in order, then the first one drafted in this round."""

    def verify(self, plan: SchedulerOutput, proposal: DraftProposal, target: TargetOutput) -> VerifyResult:
        rows: list[int] = [] if target.logits is None else target.logits.tolist()
        forwards = [item for item in plan.target.work if item.num_logits]
        decisions = {}
        for work, forward in zip(plan.verify, forwards, strict=True):
            assert work.request_id == forward.state.request_id
            assert work.position == forward.end - forward.num_logits + 1
            own, rows = rows[: forward.num_logits], rows[forward.num_logits :]
            window = proposal.windows.get(work.request_id, ())
            tested = [d.token for d in (*work.pending, *window[:1])][: len(own)]
            accepted = 0
            while accepted < len(tested) and tested[accepted] == own[accepted]:
                accepted += 1
            following = own[accepted] if accepted < len(own) else None
            decisions[work.request_id] = Decision(tuple(tested), accepted, following, None)
        assert not rows
        return VerifyResult(decisions, proposal.windows, proposal.prepared)

"""Windows drafted step by step: each token is read by the host before the next forward begins."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pearl.drafting.logits_ring import LogitsRing, keeps_logits
from pearl.engine.grammar_masks import GrammarMasks, MaskedRow
from pearl.engine.logits_processing import process_row
from pearl.host_tensors import from_numbers, start_download
from pearl.messages import Branch, Drafted, DraftPlan, DraftWork, ForwardWork, Ranked, SequenceState, Windows
from pearl.sampling_batch import SamplingBatches
from pearl.workers import ModelRunner
from pearl_kernels import Rule, Sampled, Stream


class DraftedWindows(NamedTuple):
    windows: Windows
    prepared: Windows
    steps: int  # forwards that they took


@dataclass(slots=True)
class _Line:
    """A window that grows: a request's, or a branch's, which begins with a token that is not drawn."""

    state: SequenceState
    block_table: tuple[int, ...]
    window: list[Drafted]
    position: int  # of the token that is drawn next
    left: int  # tokens to draw
    rows: Iterator[int]  # of the ring, for those tokens
    history: tuple[int, ...] | None  # the text before the window

    def masked(self, row: int) -> MaskedRow:
        """Its row of logits."""
        return MaskedRow(row, self.state, self.text[self.state.prompt_length :])

    @property
    def text(self) -> tuple[int, ...]:
        assert self.history is not None
        return (*self.history, *(drafted.token for drafted in self.window))


class HostWindows:
    """Of one drafter."""

    def __init__(
        self,
        runner: ModelRunner,
        rule: Rule,
        vocab_size: int,
        eos_ids: Collection[int],
        ring: LogitsRing,
        stream: Stream,
    ) -> None:
        self._runner, self._rule, self._vocab_size, self._eos_ids = runner, rule, vocab_size, eos_ids
        self._ring, self._stream, self._device = ring, stream, runner.queue.device
        self._batches = SamplingBatches(self._device, for_draft=True)
        self._grammars = GrammarMasks(vocab_size, eos_ids)

    def draft(self, plan: DraftPlan) -> DraftedWindows:
        """Windows of the items that draft, and of their branches. Copies of the plan are performed already, but for the
        late ones.
        """
        work = plan.work
        early = [(item, branch) for item in work for branch in item.branches if branch.token is not None]
        logits = self._runner.forward([item.forward for item in work] + [_first_work(*pair) for pair in early])
        main = {item.forward.state.request_id: self._main(item) for item in work if item.num_draft}
        prepared = {branch.id: self._branch(item, branch, branch.token) for item, branch in early}
        active = [*main.values(), *prepared.values()]
        steps = 1
        if active:
            self._draw(active, logits, plan.alternatives)
            if late := [(item, branch) for item in work for branch in item.branches if branch.token is None]:
                self._runner.copy_pages(plan.late_copies)
                for item, branch in late:
                    first = main[item.forward.state.request_id].window[0]
                    prepared[branch.id] = self._branch(item, branch, _alternative(first, branch.rank))
                    active.append(prepared[branch.id])
        while active := [line for line in active if line.left]:
            logits = self._runner.decode(
                [line.window[-1].token for line in active],
                [line.position - 1 for line in active],
                [line.block_table for line in active],
            )
            self._draw(active, logits, plan.alternatives)
            steps += 1
        return DraftedWindows(_windows(main), _windows(prepared), steps)

    def _main(self, item: DraftWork) -> _Line:
        forward, rows = item.forward, self._ring.window_rows(item, self._rule)
        state = forward.state
        return _Line(state, forward.block_table, [], forward.end, item.num_draft, iter(rows), state.history)

    def _branch(self, item: DraftWork, branch: Branch, token: int | None) -> _Line:
        """Without a token there is nothing to draft."""
        state, rows = item.forward.state, self._ring.branch_rows(item, branch, self._rule)
        history = None if state.history is None else state.history[: branch.start]
        window = [] if token is None else [Drafted(token, 0.0, -1)]
        left = 0 if token is None else branch.num_draft
        return _Line(state, branch.block_table, window, branch.start + 1, left, iter(rows), history)

    def _draw(self, lines: Sequence[_Line], logits: Tensor, alternatives: int) -> None:
        """One token for each line, from its row."""
        dtype = logits.dtype
        logits = self._process(lines, logits)
        params = self._batches.tensors([line.state for line in lines])
        where = from_numbers([line.position for line in lines], torch.int64, self._device)
        drawn = self._runner.kernels.sample(logits, params, where, self._vocab_size, self._stream, alternatives)
        for row, (line, drafted) in enumerate(zip(lines, self._read(drawn), strict=True)):
            index = next(line.rows)
            if index >= 0:
                self._ring.store(index, logits[row].to(dtype))
            line.window.append(drafted._replace(row=index))
            line.position, line.left = line.position + 1, line.left - 1

    def _read(self, drawn: Sampled) -> list[Drafted]:
        ranked = drawn.alternatives
        on_host = start_download([drawn.tokens, drawn.logprobs, *(ranked or ())])
        self._runner.queue.mark().wait()  # once, for all
        columns = [tensor.tolist() for tensor in on_host]
        if ranked is None:
            return [Drafted(token, logprob, -1) for token, logprob in zip(*columns, strict=True)]
        return [
            Drafted(token, logprob, -1, _ranked(score, tokens, scores))
            for token, logprob, tokens, scores, score in zip(*columns, strict=True)
        ]

    def _process(self, lines: Sequence[_Line], logits: Tensor) -> Tensor:
        """The rows to draw from: in fp32 where any are changed, but as the ring can keep q, which was drawn from."""
        dtype = logits.dtype
        changed = [row for row, line in enumerate(lines) if line.state.params.changes_logits]
        if changed:
            logits = logits.float()
        for row in changed:
            state = lines[row].state
            process_row(logits[row], state, lines[row].text, self._eos_ids)
            if keeps_logits(state.params, self._rule):
                logits[row] = logits[row].to(dtype)
        self._grammars.apply(logits, [line.masked(row) for row, line in enumerate(lines) if line.state.grammar])
        return logits


def _windows(lines: Mapping[int, _Line]) -> Windows:
    return {key: tuple(line.window) for key, line in lines.items()}


def _first_work(item: DraftWork, branch: Branch) -> ForwardWork:
    """What an early branch computes beside the items."""
    assert branch.token is not None
    return ForwardWork(item.forward.state, (branch.token,), branch.start, 1, branch.block_table)


def _alternative(first: Drafted, rank: int) -> int | None:
    ranked = first.ranked
    return ranked.tokens[rank] if ranked is not None and rank < len(ranked.tokens) else None


def _ranked(drawn: float, tokens: list[int], scores: list[float]) -> Ranked:
    there = tokens.index(-1) if tokens[-1] < 0 else len(tokens)
    return Ranked(drawn, tuple(tokens[:there]), tuple(scores[:there]))

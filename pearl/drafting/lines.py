"""Windows while they grow: one token is drawn for each from a row of logits, and read by the host."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.drafting.logits_ring import LogitsRing, keeps_logits
from pearl.engine.grammar_masks import GrammarMasks, MaskedRow
from pearl.engine.logits_processing import process_row
from pearl.host_tensors import from_numbers, start_download
from pearl.messages import Branch, Drafted, DraftWork, Ranked, SequenceState, Windows
from pearl.sampling_batch import SamplingBatches
from pearl.workers import DeviceQueue
from pearl_kernels import KernelSet, Rule, Sampled, Stream


@dataclass(slots=True)
class Line:
    """A window that grows: a request's, or a branch's, which begins with a token that is not drawn."""

    state: SequenceState
    block_table: tuple[int, ...]
    window: list[Drafted]
    position: int  # of the token that is drawn next
    left: int  # tokens to draw
    rows: Iterator[int]  # of the ring, for those tokens
    history: tuple[int, ...] | None  # the text before the window
    slot: int | None = None  # a branch's

    def masked(self, row: int) -> MaskedRow:
        """Its row of logits."""
        return MaskedRow(row, self.state, self.text[self.state.prompt_length :])

    @property
    def text(self) -> tuple[int, ...]:
        assert self.history is not None
        return (*self.history, *(drafted.token for drafted in self.window))


class Drawing:
    """Of one drafter, whose model has these kernels, and whose queue its rows of logits are made in."""

    def __init__(
        self,
        kernels: KernelSet,
        queue: DeviceQueue,
        rule: Rule,
        vocab_size: int,
        eos_ids: Collection[int],
        ring: LogitsRing,
        stream: Stream,
    ) -> None:
        self._kernels, self._queue, self._rule = kernels, queue, rule
        self._vocab_size, self._eos_ids, self._ring, self._stream = vocab_size, eos_ids, ring, stream
        self._batches = SamplingBatches(queue.device, for_draft=True)
        self._grammars = GrammarMasks(vocab_size, eos_ids)

    def line(self, item: DraftWork) -> Line:
        """The window that an item drafts, empty yet."""
        forward, rows = item.forward, self._ring.window_rows(item, self._rule)
        state = forward.state
        return Line(state, forward.block_table, [], item.position, item.num_draft, iter(rows), state.history)

    def branch(self, item: DraftWork, branch: Branch, first: Drafted | None = None) -> Line:
        """The window that begins with a branch's own token, or with the alternative to ``first``, of its item's window.
        Without a token there is nothing to draft.
        """
        state, rows = item.state_of(branch), self._ring.branch_rows(item, branch, self._rule)
        history = None if state.history is None else state.history[: branch.start]
        token = branch.token
        if token is None and first is not None and first.ranked is not None:
            token = first.ranked.of_rank(branch.rank)
        window = [] if token is None else [Drafted(token, 0.0, -1)]
        left = 0 if token is None else branch.num_draft
        return Line(state, branch.block_table, window, branch.start + 1, left, iter(rows), history, branch.slot)

    def draw(self, lines: Sequence[Line], logits: Tensor, alternatives: int) -> None:
        """A token from each row, of the line beside it. A line whose logits do not depend on the text may come several
        times, for tokens one after another.
        """
        dtype = logits.dtype
        logits = self._process(lines, logits)
        params = self._batches.tensors([line.state for line in lines])
        where = from_numbers(positions_of(lines), torch.int64, self._queue.device)
        drawn = self._kernels.sample(logits, params, where, self._vocab_size, self._stream, alternatives)
        indices = [next(line.rows) for line in lines]
        self._ring.store(indices, logits.to(dtype))
        for line, drafted, index in zip(lines, self._read(drawn), indices, strict=True):
            line.window.append(drafted._replace(row=index))
            line.position, line.left = line.position + 1, line.left - 1

    def _read(self, drawn: Sampled) -> list[Drafted]:
        ranked = drawn.alternatives
        on_host = start_download([drawn.tokens, drawn.logprobs, *(ranked or ())])
        self._queue.mark().wait()  # once, for all
        columns = [tensor.tolist() for tensor in on_host]
        if ranked is None:
            return [Drafted(token, logprob, -1) for token, logprob in zip(*columns, strict=True)]
        return [
            Drafted(token, logprob, -1, Ranked.of(score, tokens, scores))
            for token, logprob, tokens, scores, score in zip(*columns, strict=True)
        ]

    def _process(self, lines: Sequence[Line], logits: Tensor) -> Tensor:
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


def positions_of(lines: Sequence[Line]) -> list[int]:
    """Of the tokens that are drawn for them, in this order."""
    drawn: dict[int, int] = {}
    positions = []
    for line in lines:
        before = drawn.get(id(line), 0)
        positions.append(line.position + before)
        drawn[id(line)] = before + 1
    return positions


def windows_of(lines: Mapping[int, Line]) -> Windows:
    return {key: tuple(line.window) for key, line in lines.items()}

"""An observer that computes in plain torch the logits that each token of a head should have been drawn from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from plain_heads import PlainEagle, Tensors, hidden_states, plain_medusa
from torch import Tensor
from transformers import PreTrainedModel

from pearl import LLM
from pearl.drafting.lines import Drawing, Line, positions_of
from pearl.engine.branches import is_hit
from pearl.engine.rounds import RoundRecord
from pearl.messages import Drafted, DraftPlan, DraftProposal, DraftWork

Own = dict[int, Tensor]  # features made by the head, by position
Drawn = dict[tuple[int, int | None, int], Tensor]  # rows of logits, by request id, branch's slot and position

_CLOSE = 2e-3  # of the largest finite logit: fp32, one row at a time here and a text at once there


class HeadCheck:
    """Of one LLM on CPU. It keeps each request's text by itself, from prompts and verdicts."""

    def __init__(self, judge: PreTrainedModel, plain: PlainEagle | Tensors) -> None:
        self._judge, self._plain = judge, plain
        self._texts: dict[int, list[int]] = {}
        self._own: defaultdict[int, Own] = defaultdict(dict)
        self._drawn: Drawn = {}
        self._of_proposals: dict[int, tuple[DraftProposal, Drawn]] = {}  # a round is seen while the next one is drafted
        self.checked = self.continued = self.after_rejection = self.hits = 0
        self._rejected: set[int] = set()

    def watch(self, llm: LLM, prompts: Sequence[Sequence[int]]) -> None:
        """Before these are generated, one output each."""
        first = llm._factory.made + 1
        self._texts = {first + index: list(prompt) for index, prompt in enumerate(prompts)}
        drafter: Any = llm.engine.workers.drafter
        drafter._fused = None  # whose logits nobody sees: test_head_fused.py compares it with the steps
        drawing = drafter._drawing
        draw = Drawing.draw.__get__(drawing)

        def noted(lines: Sequence[Line], logits: Tensor, alternatives: int) -> None:
            for row, (line, position) in enumerate(zip(lines, positions_of(lines), strict=True)):
                self._drawn[line.state.request_id, line.slot, position] = logits[row].clone()
            draw(lines, logits, alternatives)

        propose = type(drafter).propose.__get__(drafter)

        def proposed(plan: DraftPlan) -> DraftProposal:
            self._drawn = drawn = {}
            proposal: DraftProposal = propose(plan)
            self._of_proposals[id(proposal)] = proposal, drawn
            return proposal

        drawing.draw, drafter.propose = noted, proposed

    @torch.no_grad()
    def __call__(self, record: RoundRecord) -> None:
        hits: dict[int, Own] = {}
        _, drawn = self._of_proposals.pop(id(record.proposal), (None, {}))
        for item in record.plan.draft.work:
            if item.num_draft:
                hits |= self._check(item, record, drawn)
        for request_id, decision in record.result.decisions.items():
            self._texts[request_id] += decision.committed
            self._own[request_id] |= hits.get(request_id, {})
            (self._rejected.add if decision.rejected else self._rejected.discard)(request_id)
        self.hits += len(hits)

    def _check(self, item: DraftWork, record: RoundRecord, drawn: Drawn) -> dict[int, Own]:
        """An item's window and those of its branches. By request id, what the one that was the verdict made itself."""
        request_id, proposal = item.forward.state.request_id, record.proposal
        assert item.forward.state.params.draft
        text, pending, own = self._texts[request_id], list(item.pending or ()), self._own[request_id]
        self._follow(text, pending, own, proposal, proposal.windows[request_id], _of(drawn, request_id, None))
        self.continued += bool(pending)
        self.after_rejection += request_id in self._rejected
        decision, hits = record.result.decisions.get(request_id), {}
        for branch in item.branches:
            window = proposal.prepared[branch.id]
            if window:
                before, ahead = [*pending[: branch.held], window[0].token], dict(own)
                self._follow(text, before, ahead, proposal, window[1:], _of(drawn, request_id, branch.slot))
                if decision is not None and is_hit(branch, window, decision):
                    hits = {request_id: ahead}
        return hits

    def _follow(
        self,
        text: list[int],
        pending: list[int],
        own: Own,
        proposal: DraftProposal,
        window: Sequence[Drafted],
        drawn: dict[int, Tensor],
    ) -> None:
        """Compare what a window was drawn from; ``own`` gets what the head makes on the way."""
        tokens = [drafted.token for drafted in window]
        if isinstance(self._plain, PlainEagle):
            expected = self._eagle(self._plain, text, pending, tokens, own)
        else:
            expected = self._medusa(self._plain, text, pending, tokens)
        for place, logits in enumerate(expected):
            self._compare(drawn[len(text) + len(pending) + place], logits)
            if window[place].row >= 0:
                assert proposal.logits is not None
                self._compare(proposal.logits[window[place].row], logits)

    def _compare(self, found: Tensor, wanted: Tensor) -> None:
        self.checked += 1
        assert torch.equal(found.isfinite(), wanted.isfinite())
        there = wanted.isfinite()
        assert (found - wanted)[there].abs().max() <= _CLOSE * wanted[there].abs().max()

    def _eagle(
        self, plain: PlainEagle, text: list[int], pending: list[int], window: list[int], own: Own
    ) -> list[Tensor]:
        """Features up to the last token but one are the target's; of pending tokens, what they were drawn from."""
        known = len(text) - 1
        states = hidden_states(self._judge, text, plain.shape["eagle_aux_hidden_state_layer_ids"])
        features = [*plain.features(states[:known]), *(own[known + i] for i in range(len(pending)))]
        tokens, found = [*text, *pending], []
        for token in window:
            output = plain.outputs(torch.stack(features), torch.tensor(tokens[1:]))[-1]
            found.append(plain.logits(output[None])[0])
            own[len(tokens) - 1] = output
            features.append(output)
            tokens.append(token)
        return found

    def _medusa(self, tensors: Tensors, text: list[int], pending: list[int], window: list[int]) -> list[Tensor]:
        last = hidden_states(self._judge, text[:-1], [self._judge.config.num_hidden_layers])[-1:, 0]
        blocks = max(int(name.split(".")[1]) for name in tensors)
        return [plain_medusa(tensors, blocks, len(pending) + i, last)[0] for i in range(len(window))]


def _of(drawn: Drawn, request_id: int, slot: int | None) -> dict[int, Tensor]:
    """A line's, by position."""
    return {position: row for (owner, where, position), row in drawn.items() if (owner, where) == (request_id, slot)}

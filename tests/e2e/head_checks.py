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
from pearl.drafting.lines import Drawing, Line
from pearl.engine.rounds import RoundRecord

_CLOSE = 2e-3  # of the largest finite logit: fp32, one row at a time here and a text at once there


class HeadCheck:
    """Of one LLM on CPU. It keeps each request's text by itself, from prompts and verdicts."""

    def __init__(self, judge: PreTrainedModel, plain: PlainEagle | Tensors) -> None:
        self._judge, self._plain = judge, plain
        self._texts: dict[int, list[int]] = {}
        self._own: defaultdict[int, dict[int, Tensor]] = defaultdict(dict)  # features made by the head, by position
        self._drawn: dict[tuple[int, int], Tensor] = {}  # by request id and position
        self.checked = self.continued = self.after_rejection = 0
        self._rejected: set[int] = set()

    def watch(self, llm: LLM, prompts: Sequence[Sequence[int]]) -> None:
        """Before these are generated, one output each."""
        first = llm._factory.made + 1
        self._texts = {first + index: list(prompt) for index, prompt in enumerate(prompts)}
        drawing: Any = llm.engine.workers.drafter._drawing  # type: ignore[union-attr]
        draw = Drawing.draw.__get__(drawing)

        def noted(lines: Sequence[Line], logits: Tensor, alternatives: int) -> None:
            for row, line in enumerate(lines):
                self._drawn[line.state.request_id, line.position] = logits[row].clone()
            draw(lines, logits, alternatives)

        drawing.draw = noted

    @torch.no_grad()
    def __call__(self, record: RoundRecord) -> None:
        proposal = record.proposal
        for item in record.plan.draft.work:
            if item.num_draft:
                request_id = item.forward.state.request_id
                assert item.forward.state.params.draft
                pending, window = list(item.pending or ()), [d.token for d in proposal.windows[request_id]]
                expected = self._eagle if isinstance(self._plain, PlainEagle) else self._medusa
                for place, logits in enumerate(expected(request_id, pending, window)):
                    position = len(self._texts[request_id]) + len(pending) + place
                    self._compare(self._drawn.pop((request_id, position)), logits)
                    row = proposal.windows[request_id][place].row
                    if row >= 0:
                        assert proposal.logits is not None
                        self._compare(proposal.logits[row], logits)
                self.continued += bool(pending)
                self.after_rejection += request_id in self._rejected
        for request_id, decision in record.result.decisions.items():
            self._texts[request_id] += decision.committed
            (self._rejected.add if decision.rejected else self._rejected.discard)(request_id)

    def _compare(self, found: Tensor, wanted: Tensor) -> None:
        self.checked += 1
        assert torch.equal(found.isfinite(), wanted.isfinite())
        there = wanted.isfinite()
        assert (found - wanted)[there].abs().max() <= _CLOSE * wanted[there].abs().max()

    def _eagle(self, request_id: int, pending: list[int], window: list[int]) -> list[Tensor]:
        """Features up to the last token but one are the target's; of pending tokens, what they were drawn from."""
        plain, text, own = self._plain, self._texts[request_id], self._own[request_id]
        assert isinstance(plain, PlainEagle)
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

    def _medusa(self, request_id: int, pending: list[int], window: list[int]) -> list[Tensor]:
        tensors, text = self._plain, self._texts[request_id]
        assert isinstance(tensors, dict)
        last = hidden_states(self._judge, text[:-1], [self._judge.config.num_hidden_layers])[-1:, 0]
        blocks = max(int(name.split(".")[1]) for name in tensors)
        return [plain_medusa(tensors, blocks, len(pending) + i, last)[0] for i in range(len(window))]

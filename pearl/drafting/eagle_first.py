"""A round's first forward of an EAGLE-3 head: which rows it has, of which features, and what of it is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pearl.drafting.own_states import OwnStates
from pearl.heads.eagle import EagleHead
from pearl.host_tensors import from_numbers
from pearl.messages import DraftPlan, DraftWork, ForwardWork


@dataclass(frozen=True)
class FirstForward:
    """It has, of each request, the rows whose target's states have come since the last one: they replace what the head
    had made of drafted tokens. And, where tokens are pending, the row behind the last of them, from the state that
    this was drawn from. Both in one, because keys and values are of a row's own input alone (``pearl.heads.eagle``).

    forwards: those of the first kind, then the others. features: ``[N, D]``, of their rows. sources: by request id, the
    forward whose last row its window is drafted from; none where the state for it has been kept.
    """

    items: tuple[DraftWork, ...]  # of each forward
    forwards: tuple[ForwardWork, ...]
    features: Tensor
    sources: dict[int, int]

    @classmethod
    def of(cls, plan: DraftPlan, model: EagleHead, states: OwnStates) -> FirstForward:
        behind = [item for item in plan.work if item.forward.tokens]
        ahead = [item for item in plan.work if item.num_draft and item.pending]
        forwards, features = [item.forward for item in behind], []
        if behind:
            assert plan.states is not None
            features.append(model.features(plan.states.of_work(forwards)))
        if ahead:
            drawn_from = [states.place(item.forward.state, item.position - 1) for item in ahead]
            features.append(states.get(drawn_from))
        sources = {item.forward.state.request_id: index for index, item in enumerate(behind) if not item.pending}
        sources |= {item.forward.state.request_id: len(behind) + index for index, item in enumerate(ahead)}
        every = features[0] if len(features) == 1 else torch.cat([states.rows[:0], *features])
        return cls((*behind, *ahead), (*forwards, *map(_behind_pending, ahead)), every, sources)

    @property
    def ends(self) -> list[int]:
        """Of each forward, its last row."""
        ends, end = [], -1
        for work in self.forwards:
            end += len(work.tokens)
            ends.append(end)
        return ends

    def keep(self, which: Sequence[int], outputs: Tensor, states: OwnStates) -> None:
        """The states that the tokens right behind these forwards will be drawn from, or are. outputs: ``[N, D]``."""
        if which:
            ends = self.ends
            rows = from_numbers([ends[index] for index in which], torch.int64, outputs.device)
            work = [self.forwards[index] for index in which]
            states.put([states.place(item.state, item.end + 1) for item in work], outputs[rows])

    def drawn_from(self) -> list[int]:
        """The forwards behind which the next token of a request comes; none where it comes behind pending tokens, and
        nothing is drafted after these.
        """
        return list(self.sources.values())

    def resting(self) -> list[int]:
        """Of those, the ones that draft nothing in this round."""
        return [index for index in self.sources.values() if not self.items[index].num_draft]


def _behind_pending(item: DraftWork) -> ForwardWork:
    """The row of the last pending token."""
    assert item.pending
    return item.forward._replace(tokens=item.pending[-1:], start=item.position - 2, num_logits=1)

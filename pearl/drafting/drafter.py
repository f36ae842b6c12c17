"""The interface between the engine and whatever proposes tokens."""

from __future__ import annotations

from typing import Protocol

from pearl.messages import DraftPlan, DraftProposal


class Drafter(Protocol):
    """Runs on the draft worker's thread."""

    reads_history: bool  # wants SequenceState.history of every request
    # Of the target, numbered as in ``pearl.models.hidden_states``. Where there are any, a plan has their states of the
    # tokens that the target computed in the round before, and work for all of them.
    hidden_layers: tuple[int, ...]
    most_behind: int  # tokens of a request that it computes in a round that only decodes, at most

    @property
    def prepares(self) -> bool:
        """Whether it drafts the branches of a plan; else it must be given none."""
        ...

    def propose(self, plan: DraftPlan) -> DraftProposal:
        """Compute each item's tokens, then draft up to ``num_draft`` tokens after them (fewer, even none, is fine).
        Likewise after the token of each of its branches.

        ``Drafted.logprob`` must be the log-probability with which the token was really drawn, and ``row`` the row of
        ``DraftProposal.logits`` with the logits it was drawn from; that row must stay valid until the token is
        decided, at the latest two rounds on.
        """
        ...

    def waits(self, plan: DraftPlan) -> bool:
        """Whether ``propose`` will wait for its device, token by token: what can work meanwhile is enqueued before."""
        ...

"""Windows made longer by phrases, after Ouroboros (Zhao et al. 2024): what the target guessed before is put behind what
the draft model drafted, so that one verification looks at more.

Ouroboros makes phrases while the draft drafts too, and verifies several endings of a window at once, which needs a mask
of its own. Here they are those of ``bench.evaluation.guesses``, and a window has one ending.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bench.evaluation.guesses import GuessPool
from pearl.drafting import Drafter
from pearl.messages import Busy, Drafted, DraftPlan, DraftProposal, DraftWork, Windows


class PhraseDrafter:
    """Of each window the last ``most`` tokens, and all but one of a short one, are left to phrases."""

    reads_history = False
    hidden_layers: tuple[int, ...] = ()
    most_behind = 2  # as a draft model
    prepares = False

    def __init__(self, drafter: Drafter, pool: GuessPool, most: int) -> None:
        self._drafter, self._pool, self._most = drafter, pool, most

    @classmethod
    def around(cls, pool: GuessPool, most: int) -> Callable[[Drafter], Drafter]:
        """Around a draft model's drafter."""
        return lambda drafter: cls(drafter, pool, most)

    def propose(self, plan: DraftPlan) -> DraftProposal:
        shorter = [item._replace(num_draft=self._own(item.num_draft)) for item in plan.work]
        proposal = self._drafter.propose(replace(plan, work=tuple(shorter)))
        windows = dict(proposal.windows)
        if proposal.on_device is not None:
            windows |= proposal.on_device.read()[0]
        phrases = {item.forward.state.request_id: self._phrase(item, windows) for item in plan.work}
        proposal = self._compute(plan, replace(proposal, windows=windows, on_device=None), phrases)
        longer = {
            key: (*window, *(Drafted(t, 0.0, -1) for t in phrases.get(key, ()))) for key, window in windows.items()
        }
        return replace(proposal, windows=longer)

    def waits(self, plan: DraftPlan) -> bool:
        return self._drafter.waits(plan)

    def _own(self, count: int) -> int:
        return max(min(count, 1), count - self._most)

    def _phrase(self, item: DraftWork, windows: Windows) -> list[int]:
        request_id = item.forward.state.request_id
        window, most = windows.get(request_id, ()), item.num_draft - self._own(item.num_draft)
        return self._pool.phrase(request_id, window[-1].token, most) if window and most else []

    def _compute(self, plan: DraftPlan, proposal: DraftProposal, phrases: dict[int, list[int]]) -> DraftProposal:
        """All of a window but its last token is in the draft's KV: so the engine counts, whoever drafted it."""
        work = []
        for item in plan.work:
            forward = item.forward
            phrase, window = phrases[forward.state.request_id], proposal.windows.get(forward.state.request_id, ())
            if phrase:
                tokens = (window[-1].token, *phrase[:-1])
                start = forward.end + len(window) - 1
                work.append(DraftWork(forward._replace(tokens=tokens, start=start, num_logits=0), 0))
        if not work:
            return proposal
        begin = proposal.busy.begin
        computed = self._drafter.propose(DraftPlan(tuple(work)))
        seconds = computed.busy.begin + computed.busy.seconds - begin
        return replace(proposal, steps=proposal.steps + computed.steps, busy=Busy(begin, seconds))

"""How a drafter comes along with a request, as far as the scheduler has to know: by its own tokens, or by the target's
hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pearl.engine.request import Request
from pearl.kv import KVCacheManager, Shifted
from pearl.methods import PLAIN, Intent


class DraftSide(Protocol):
    """``kv``: of the drafter; None: it keeps none. Positions are of the request's committed, then pending tokens."""

    kv: KVCacheManager | None

    def intents(self, batch: Sequence[Request], intents: Sequence[Intent]) -> Sequence[Intent]:
        """What a method's intents become where a request cannot be drafted for yet."""
        ...

    def is_behind(self, request: Request, intent: Intent) -> bool:
        """Whether it has to compute a prompt, or text from which it rested, before it can do what is wanted."""
        ...

    def leaves_pages(self, request: Request) -> bool:
        """Whether the target may take over what it computes for others while it waits."""
        ...

    def ends(self, request: Request, num_draft: int) -> tuple[int, int]:
        """Where its forward ends if so many tokens are drafted; and up to where its KV is written then."""
        ...

    def progress(self, lag: int, share: int) -> tuple[bool, int]:
        """Whether it comes as far as it should, ``lag`` tokens, with its share of the budget; and how many it computes
        if one of the models does not.
        """
        ...

    def tokens(self, request: Request, begin: int, end: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        """What it computes for positions [begin, end); and the pending tokens, where it has to be told."""
        ...

    def begin(self, request: Request, target: KVCacheManager) -> tuple[int, int]:
        """Register it in both models' KV: tokens of the target and of the drafter that are found cached."""
        ...

    def settle(self, request: Request) -> None:
        """Give back and commit pages after a round."""
        ...


class OwnTokens:
    """It computes the tokens itself, as a draft model does, or looks at the text alone."""

    def __init__(self, kv: KVCacheManager | None) -> None:
        self.kv = kv

    def intents(self, batch: Sequence[Request], intents: Sequence[Intent]) -> Sequence[Intent]:
        return intents

    def is_behind(self, request: Request, intent: Intent) -> bool:
        return intent.draft and self.kv is not None and request.draft_lags

    def leaves_pages(self, request: Request) -> bool:
        return True

    def ends(self, request: Request, num_draft: int) -> tuple[int, int]:
        if not num_draft or self.kv is None:
            return request.draft_computed, request.draft_computed
        end = len(request.tokens) + len(request.pending)
        return end, end + num_draft - 1  # the last drafted token is not computed

    def progress(self, lag: int, share: int) -> tuple[bool, int]:
        ready = lag <= max(share, 2)
        return ready, 0 if ready else share

    def tokens(self, request: Request, begin: int, end: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        return request.token_range(begin, end), None

    def begin(self, request: Request, target: KVCacheManager) -> tuple[int, int]:
        drafted = request.tokens if request.params.draft else ()
        return target.begin(request.id, request.reusable), self.kv.begin(request.id, drafted) if self.kv else 0

    def settle(self, request: Request) -> None:
        if self.kv is not None:
            self.kv.settle(request.id, request.tokens, request.draft_computed)


class TargetStates:
    """It computes from the target's hidden states: those of each round in the next one that is planned, whatever the
    pace says. So it never lags, and while the target computes a prompt there is no draft. Position p of it has the
    target's state at p and the token at p + 1.
    """

    def __init__(self, kv: KVCacheManager | None) -> None:
        self.kv = kv

    def intents(self, batch: Sequence[Request], intents: Sequence[Intent]) -> Sequence[Intent]:
        return [i if _has_state(r) else PLAIN for r, i in zip(batch, intents, strict=True)]

    def is_behind(self, request: Request, intent: Intent) -> bool:
        return False

    def leaves_pages(self, request: Request) -> bool:
        """Not where the states of all its tokens are read: beyond what ``begin`` found the target computes them."""
        return not request.params.draft

    def ends(self, request: Request, num_draft: int) -> tuple[int, int]:
        end = max(request.draft_computed, request.target_computed if request.params.draft else 0)
        return end, request.length + len(request.pending) + num_draft - 2 if num_draft else end

    def progress(self, lag: int, share: int) -> tuple[bool, int]:
        return True, lag

    def tokens(self, request: Request, begin: int, end: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        return request.token_range(begin + 1, end + 1), tuple([drafted.token for drafted in request.pending])

    def begin(self, request: Request, target: KVCacheManager) -> tuple[int, int]:
        """It finds no states of what the target does not compute: so that takes over no more than this does."""
        if not request.params.draft:
            return target.begin(request.id, request.reusable), self.kv.begin(request.id, ()) if self.kv else 0
        if self.kv is None:  # the state before the last token is wanted all the same: a window begins with it
            cached = target.begin(request.id, request.reusable[: request.length - 1])
            return cached, cached
        draft_cached = self.kv.begin(request.id, Shifted(request.tokens))
        return target.begin(request.id, request.reusable[: draft_cached + 1]), draft_cached

    def settle(self, request: Request) -> None:
        if self.kv is not None:
            drafted = request.length + len(request.pending) - 1 if request.pending else 0
            self.kv.settle(request.id, Shifted(request.tokens), request.draft_computed, drafted)


def _has_state(request: Request) -> bool:
    """Whether the target has computed what a window is drafted from: all but the last token, and one at least."""
    return request.target_computed > 0 and not request.target_lags

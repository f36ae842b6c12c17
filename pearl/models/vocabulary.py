"""What token ids mean, and whether two models mean the same by them.

A draft's tokens are only proposals: what it means by an id, or that it lacks one, costs speed where it matters and
never the output. So two vocabularies need not be equal, only grown from the same core.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from pearl.errors import ConfigurationError
from pearl.user_values import shown


@dataclass(frozen=True)
class Vocabulary:
    """``tokens`` by id, which may have gaps. ``added``: ids of special, padding and other tokens beside the core."""

    tokens: Mapping[int, str]
    added: Set[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Vocabulary:
        """Of a transformers tokenizer."""
        tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
        try:
            added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}
        except (AttributeError, NotImplementedError):  # not every backend tells its added tokens from others
            added = {}
        return cls({**tokens, **added}, added.keys() | set(getattr(tokenizer, "all_special_ids", ())))

    @property
    def size(self) -> int:
        """One more than the highest id."""
        return max(self.tokens, default=-1) + 1

    def outside(self, token: object, count: int) -> str:
        """How an error names an id that is none of a model's ``count``."""
        text = self.tokens.get(token) if isinstance(token, int) else None
        if text is None:
            return f"{shown(token)}, outside the vocabulary [0, {count})"
        return f"{token} ({text!r}), outside the vocabulary [0, {count}): the model has no row for it"


@dataclass(frozen=True)
class Agreement:
    """Of two vocabularies, about the ids that both have."""

    common: int  # ids that mean the same
    differing: tuple[int, ...]
    core: tuple[int, ...]  # of those, ids of tokens that neither side has added


def compare(target: Vocabulary, draft: Vocabulary, limit: int) -> Agreement:
    """``limit``: ids at or past it do not count; one of the models has no row for them."""
    shared = [i for i in target.tokens.keys() & draft.tokens.keys() if i < limit]
    differing = sorted(i for i in shared if target.tokens[i] != draft.tokens[i])
    core = tuple(i for i in differing if i not in target.added and i not in draft.added)
    return Agreement(len(shared) - len(differing), tuple(differing), core)


def require_common_core(target: Vocabulary, draft: Vocabulary, limit: int) -> None:
    """ConfigurationError unless ids mean the same to both, but for added tokens and what only one of them has."""
    if target.tokens == draft.tokens:  # as mostly; looking at each id takes long
        return
    found = compare(target, draft, limit)
    if not found.core and found.common:
        return
    example = next(iter((*found.core, *found.differing)), None)
    difference = "" if example is None else f": {example} is {draft.tokens[example]!r} and {target.tokens[example]!r}"
    raise ConfigurationError(
        f"the draft's tokenizer differs from the target's: of the {found.common + len(found.differing)} ids that both "
        f"have, {len(found.differing)} mean something else{difference}; choose a draft of the target's family"
    )


def usable_ids(tokenizer_size: int, eos_ids: Set[int], rows: int) -> int:
    """How many ids a request may name and the model may draw: its tokens and ends of text, not the padding behind them.

    ``rows``: of the model's embedding and head; it can neither read nor write an id past them.
    """
    ends = [token + 1 for token in eos_ids if token < rows]
    return min(rows, max([tokenizer_size, *ends]))

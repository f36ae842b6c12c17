"""Our entries in transformers' registries of attention and mask functions: names of our own, functions without state.

transformers' modules look their attention up by the name in their configuration, once for each call. What ours does is
told by the module that calls: each module of a model that we run has the model's ``Attend`` among its attributes. So
models do not meet in the registries, and modules that are not ours are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pearl.errors import UnsupportedModelError

PAGED = "pearl_paged"  # no masks are made for it
TRACED = "pearl_traced"  # masks are replaced by what they say
NOT_CAUSAL = -1
_ATTRIBUTE = "_pearl_attend"


class AttentionCall(NamedTuple):
    """A module's call of its attention. query ``[1, Hq, N, D]``, key and value ``[1, Hk, N, D]``."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]  # the other keyword arguments


Attend: TypeAlias = Callable[[AttentionCall], Tensor]  # returns [1, N, Hq, D]


def register() -> None:
    """Make our names known to transformers. To call it again changes nothing."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PAGED, _attention)
    AttentionInterface.register(TRACED, _attention)
    AttentionMaskInterface.register(TRACED, _mask)


def bind(model: nn.Module, attend: Attend) -> None:
    """What attention of this model's modules means from now on. ``attend`` must not hold the model."""
    for module in model.modules():
        module.__dict__[_ATTRIBUTE] = attend


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    attend: Attend | None = module.__dict__.get(_ATTRIBUTE)
    if attend is None:
        raise UnsupportedModelError(
            f"attention named {PAGED!r} or {TRACED!r} is for models that pearl has loaded, not for this "
            f"{type(module).__name__}"
        )
    return attend(AttentionCall(module, query, key, value, attention_mask, options)), None


def _mask(*, mask_function: Callable[..., Any], config: Any, **_: Any) -> Tensor:
    """In place of a mask: an integer ``[1, 1, 1, 1]``, the sliding window that the mask would be, 0 for a causal mask
    without one, NOT_CAUSAL for any other.
    """
    window = _window(mask_function, positions(config))
    return torch.full((1, 1, 1, 1), NOT_CAUSAL if window is None else window)


def positions(config: Any) -> int:
    """As many as a configuration says that its model was made for; 0 if it does not. Beyond 2^22 none are looked at."""
    longest = getattr(config, "max_position_embeddings", None)
    return min(longest, 1 << 22) if isinstance(longest, int) and longest > 0 else 0


def _window(mask_function: Callable[..., Any], length: int) -> int | None:
    """The window of a mask over ``length`` positions, told from its rows; None if it is not a causal mask with one."""
    keys, first = torch.arange(length), torch.tensor(0)

    def row(query: int) -> Tensor:
        visible: Tensor = mask_function(first, first, torch.tensor(query), keys)
        return visible.expand(length)

    seen = int(row(length - 1).sum()) if length else 0
    window = seen % length if length else 0
    edges = {0, 1, window - 1, window, window + 1, 2 * window, 3 * window, length // 2, length - 2, length - 1}
    for query in sorted(query for query in edges if 0 <= query < length):
        wanted = (keys <= query) & (keys > query - window) if window else keys <= query
        if not torch.equal(row(query), wanted):
            return None
    return window if length else None

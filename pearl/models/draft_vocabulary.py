"""A drafter that has only some of its target's ids to say, the frequent ones (FR-Spec, arXiv 2502.14856).

It reads all ids. Those that it cannot say have logits of -inf: q is 0 there, and the residual that replaces a rejected
token is exact. Nothing beyond the weights needs to know.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pearl.errors import ModelLoadError

REDUCED_SIZE = "reduced_vocab_size"  # of a draft model's config.json
TARGET_IDS = "draft_ids"  # its tensor: int64 [Vd], what its head's rows are to the target


def checked_ids(name: str, ids: Tensor, vocab_size: int, offsets: bool = False) -> Tensor:
    """int64 ``[Vd]``, on the host. ModelLoadError unless each is another one of ``vocab_size``.

    ``offsets``: they are stored as by how much each is larger than its place.
    """
    if ids.is_floating_point() or ids.dtype is torch.bool:
        raise ModelLoadError(f"{name} must hold integers, not {ids.dtype}")
    ids = ids.to("cpu", torch.int64) + (torch.arange(len(ids)) if offsets else 0)
    if ids.min() < 0 or ids.max() >= vocab_size or len(set(ids.tolist())) < len(ids):
        raise ModelLoadError(
            f"{name} must give each of the draft's {len(ids)} ids another of the target's {vocab_size}: it does not"
        )
    return ids


def spread(own: Tensor, ids: Tensor | None, vocab_size: int) -> Tensor:
    """Logits ``[M, Vd]`` to ``[M, V]``: -inf but at ``ids`` ``[Vd]``; as they are if that is None."""
    if ids is None:
        return own
    return own.new_full((own.shape[0], vocab_size), -torch.inf).index_copy_(1, ids, own)

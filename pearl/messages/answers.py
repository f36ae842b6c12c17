"""What the models give the verifier."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from pearl.messages.device_windows import DeviceWindows
from pearl.messages.drafted import Windows
from pearl.messages.timing import NOT_BUSY, Interval, Mark


@dataclass(frozen=True)
class DraftProposal:
    windows: Windows = field(default_factory=dict)
    logits: Tensor | None = None  # [Q, Vq] raw draft logits that ``Drafted.row`` points into
    steps: int = 0  # forwards of the draft model
    busy: Interval = NOT_BUSY
    on_device: DeviceWindows | None = None  # beside ``windows``
    stored: Mark | None = None  # after it ``logits`` has the rows of ``windows``, of this round and of those before
    prepared: Windows = field(default_factory=dict)  # of branches; of a late one that had no token, an empty one


@dataclass(frozen=True)
class TargetOutput:
    logits: Tensor | None  # [sum of num_logits, V], in the order of the plan's work
    busy: Interval = NOT_BUSY
    hidden: Tensor | None = None  # [N, layers, D] of all tokens, in the same order; where a drafter reads them

"""From requests' sampling parameters to the tensors that ``sample`` and ``verify`` take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pearl.messages import SequenceState
from pearl.sampling_params import SamplingParams
from pearl_kernels import SamplingTensors


def draft_temperature(params: SamplingParams) -> float:
    return params.temperature if params.draft_temperature is None else params.draft_temperature


def sampling_tensors(states: Sequence[SequenceState], device: torch.device, for_draft: bool = False) -> SamplingTensors:
    """One entry for each sequence. ``for_draft`` takes the draft's temperature; the cutoffs are the request's."""
    params = [state.params for state in states]
    temperatures = [draft_temperature(p) if for_draft else p.temperature for p in params]
    return SamplingTensors(
        temperature=torch.tensor(temperatures, dtype=torch.float32, device=device),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32, device=device),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
        seed=torch.tensor([_signed(state.seed) for state in states], dtype=torch.int64, device=device),
    )


def _signed(seed: int) -> int:
    """The 64-bit pattern as torch's int64."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed

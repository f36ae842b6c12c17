"""From requests' sampling parameters to the tensors that ``sample`` and ``verify`` take."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pearl.host_tensors import from_numbers
from pearl.messages import SequenceState
from pearl.sampling_params import SamplingParams
from pearl_kernels import SamplingTensors


def draft_temperature(params: SamplingParams) -> float:
    return params.temperature if params.draft_temperature is None else params.draft_temperature


class SamplingBatches:
    """Makes the tensors of a batch, and remembers them: in most rounds the batch is the one before.

    ``for_draft`` takes the draft's temperature; the cutoffs are the request's. Belongs to one thread.
    """

    def __init__(self, device: torch.device, for_draft: bool = False) -> None:
        self._device, self._for_draft = device, for_draft
        self._key: tuple[tuple[SamplingParams, int], ...] | None = None
        self._tensors: SamplingTensors | None = None

    def tensors(self, states: Sequence[SequenceState]) -> SamplingTensors:
        """One entry for each sequence. Must not be written to."""
        key = tuple((state.params, state.seed) for state in states)
        if self._tensors is None or key != self._key:
            self._key, self._tensors = key, self._make(states)
        return self._tensors

    def _make(self, states: Sequence[SequenceState]) -> SamplingTensors:
        params, device = [state.params for state in states], self._device
        temperatures = [draft_temperature(p) if self._for_draft else p.temperature for p in params]
        return SamplingTensors(
            temperature=from_numbers(temperatures, torch.float32, device),
            top_k=from_numbers([p.top_k for p in params], torch.int32, device),
            top_p=from_numbers([p.top_p for p in params], torch.float32, device),
            min_p=from_numbers([p.min_p for p in params], torch.float32, device),
            seed=from_numbers([_signed(state.seed) for state in states], torch.int64, device),
        )


def _signed(seed: int) -> int:
    """The 64-bit pattern as torch's int64."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed

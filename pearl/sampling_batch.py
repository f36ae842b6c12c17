"""From requests' sampling parameters to the tensors that ``sample`` and ``verify`` take."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch

from pearl.host_tensors import Array, array, upload
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
        self._states: list[SequenceState] = []
        self._key: tuple[tuple[SamplingParams, int], ...] = ()
        self._tensors: SamplingTensors | None = None

    def tensors(self, states: Sequence[SequenceState]) -> SamplingTensors:
        """One entry for each sequence. Must not be written to."""
        before = self._states
        if self._tensors is not None and len(states) == len(before) and all(map(operator.is_, states, before)):
            return self._tensors
        key = tuple([(state.params, state.seed) for state in states])
        if self._tensors is None or key != self._key:
            self._key, self._tensors = key, self._make(states)
        self._states = list(states)
        return self._tensors

    def _make(self, states: Sequence[SequenceState]) -> SamplingTensors:
        arrays = sampling_arrays(states, self._for_draft)
        return SamplingTensors(**dict(zip(arrays, upload(list(arrays.values()), self._device), strict=True)))


def sampling_arrays(states: Sequence[SequenceState], for_draft: bool = False, padding: int = 0) -> dict[str, Array]:
    """The fields of ``SamplingTensors``; ``padding`` more entries at the end are greedy."""
    params = [state.params for state in states]
    temperatures = [draft_temperature(p) if for_draft else p.temperature for p in params]
    none = [0] * padding
    return {
        "temperature": array([*temperatures, *none], torch.float32),
        "top_k": array([*(p.top_k for p in params), *none], torch.int32),
        "top_p": array([*(p.top_p for p in params), *[1.0] * padding], torch.float32),
        "min_p": array([*(p.min_p for p in params), *none], torch.float32),
        "seed": array([*(_signed(state.seed) for state in states), *none], torch.int64),
    }


def _signed(seed: int) -> int:
    """The 64-bit pattern as torch's int64."""
    seed &= 2**64 - 1
    return seed - 2**64 if seed >= 2**63 else seed

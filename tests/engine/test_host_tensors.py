"""What crosses between host and device goes through pinned memory: a stream waits for nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pearl.engine.logits_processing import process_row
from pearl.host_tensors import send_rows
from pearl.messages import SequenceState
from pearl.sampling_params import SamplingParams

META = torch.device("meta")  # in place of a GPU: a device that is not the CPU


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The pinned tensors that are made. Without a GPU torch has none: they are plain ones here."""
    made: list[torch.Tensor] = []
    empty = torch.empty

    def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        if pin_memory:
            made.append(tensor)
        return tensor

    monkeypatch.setattr(torch, "empty", make)
    return made


def test_rows_of_the_cpu_are_staged_in_pinned_memory(pinned: list[torch.Tensor]) -> None:
    table = torch.arange(12.0, dtype=torch.bfloat16).view(4, 3)
    sent = send_rows(table, [3, 1], META)
    assert (sent.device, sent.dtype, sent.shape) == (META, torch.bfloat16, (2, 3))
    assert pinned[-1].tolist() == [[9.0, 10.0, 11.0], [3.0, 4.0, 5.0]]


def test_rows_that_stay_on_the_cpu_are_not(pinned: list[torch.Tensor]) -> None:
    assert send_rows(torch.arange(3.0)[:, None], [2, 0], torch.device("cpu")).tolist() == [[2.0], [0.0]]
    assert pinned == []


def test_penalties_bring_their_numbers_through_pinned_memory(
    pinned: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``torch.tensor`` on a GPU waits for all that was enqueued there: for the forward whose logits are changed."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("torch.tensor waits for the device")

    monkeypatch.setattr(torch, "tensor", refuse)
    params = SamplingParams(
        repetition_penalty=1.3, presence_penalty=0.1, frequency_penalty=0.2, logit_bias={3: 1.0}, min_tokens=9
    )
    row = torch.zeros(8, device=META)
    process_row(row, SequenceState(1, 0, params, 0, 1, None), (1, 2, 2), {0})
    assert len(pinned) == 6

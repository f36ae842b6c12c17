"""The recording device itself, which stands for a GPU in tests/e2e/test_graphs_*.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from captured_calls import Freed
from recording_queue import Looked, RecordingQueue
from torch import Tensor

from pearl import SamplingParams
from pearl.errors import CaptureError

LENGTHS = (1, 2, 3, 15, 16, 17, 40, 70)
TOKENS = 24
PLACES = ("target draft", "target draft apart", "target apart", "draft")
SAMPLED = [
    SamplingParams(temperature=t, seed=31 * i, max_tokens=TOKENS - i, ignore_eos=True, **cutoff)
    for i, (t, cutoff) in enumerate(
        [(0.0, {}), (0.7, {}), (1.0, {"top_k": 20}), (1.3, {"top_p": 0.8}), (0.9, {"min_p": 0.05}),
         (0.8, {"draft_temperature": 1.2}), (1.0, {"draft_temperature": 0.0}), (0.0, {})]
    )
]  # fmt: skip


def test_the_recording_device_refuses_what_a_device_would_not_do() -> None:
    queue, numbers = RecordingQueue(), torch.arange(4)
    for look in (numbers.tolist, numbers[0].item, lambda: bool(numbers[0] > 0), numbers.nonzero):
        with pytest.raises(Looked), queue.enter("test"):
            look()


def test_the_recording_device_repeats_operators_not_python() -> None:
    queue, numbers, out = RecordingQueue(), torch.arange(4), torch.zeros(4, dtype=torch.int64)
    step = 0

    def call() -> None:
        nonlocal step
        step += 1
        out.copy_((numbers * 2).cumsum(0) + step)

    replay = queue.capture(call)
    numbers.fill_(3)
    for _ in range(2):
        replay()
        queue.synchronize()
        assert out.tolist() == [8, 14, 20, 26]  # the captured call was the second one
    with pytest.raises(CaptureError, match="a capture may not bring numbers from the host"):
        queue.capture(lambda: out.copy_(torch.tensor([1, 2, 3, 4])))


def test_the_recording_device_keeps_nobodys_memory_alive() -> None:
    """As on a GPU a replay knows addresses; memory that the capture took is its own, and holds nothing in between."""
    queue, out = RecordingQueue(), torch.zeros(3)

    def bind() -> tuple[Callable[[], None], Tensor]:
        numbers = torch.ones(3)

        def call() -> None:
            room = torch.empty(3)
            room[:2] = numbers[:2] * 2
            out.copy_(room)

        return call, numbers[1:]

    call, view = bind()
    replay = queue.capture(call)
    replay()
    queue.synchronize()
    assert out[:2].tolist() == [2, 2]
    assert out[2].isnan()
    del call
    replay()  # whoever holds a part holds all of it
    queue.synchronize()
    del view
    replay()
    with pytest.raises(Freed, match="__getitem__ works on memory that was freed"):
        queue.synchronize()

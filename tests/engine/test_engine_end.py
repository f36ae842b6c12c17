"""Errors after which nothing can be computed end the engine: every request is answered, none is accepted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engine_rig import TOKEN, Rig, raising, tokens_of

from pearl.errors import CaptureError, EngineClosedError, RankError

HINT = "\nCUDA kernel errors might be asynchronously reported at some other API call."


def accelerator_error(words: str, code: int | None = None) -> Exception:
    """As torch raises it, with CUDA's number where torch tells it."""
    error = torch.AcceleratorError(f"CUDA error: {words}{HINT}")
    if code is not None:
        error.error_code = code  # type: ignore[attr-defined]
    return error


FATAL = [
    accelerator_error("an illegal memory access was encountered", 700),
    accelerator_error("device-side assert triggered", 710),
    accelerator_error("unspecified launch failure"),
    RuntimeError("pearl_kernels.cuda: rms_norm: misaligned address"),
    CaptureError("a CUDA graph could not be captured (OutOfMemoryError: CUDA out of memory.)"),
    RankError("rank 1 of 2 ended with status -9"),
]
OF_A_ROUND = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    accelerator_error("invalid configuration argument", 9),
    accelerator_error("out of memory", 2),
    ValueError("an illegal memory access was encountered, says a user's text"),
]


@pytest.fixture(params=[False, True], ids=["in turn", "overlapping"])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    made = Rig(lanes=2, overlaps=request.param)
    made.add(1, 2, 3)  # the third waits
    made.settle()
    yield made
    made.engine.close()


def assert_ended(rig: Rig, error: Exception) -> None:
    ended = {delta.request_id: delta for delta in rig.engine.step()}
    assert ended.keys() == {1, 2, 3}
    for delta in ended.values():
        assert (delta.finish_reason, delta.token_ids) == ("abort", ())
        assert delta.error == f"{type(error).__name__}: {error}"
    rig.check_empty()
    assert_refuses(rig, error)


def assert_refuses(rig: Rig, error: Exception) -> None:
    for refused in (rig.engine.step, lambda: rig.add(4)):
        with pytest.raises(EngineClosedError, match="build a new one") as closed:
            refused()
        assert str(error) in str(closed.value)
        assert closed.value.__cause__ is error
    assert not rig.engine.has_work


@pytest.mark.parametrize("error", FATAL, ids=str)
@pytest.mark.parametrize("where", ["target", "drafter", "verifier"])
def test_what_leaves_a_device_unusable_ends_all_requests(rig: Rig, where: str, error: Exception) -> None:
    getattr(rig, where).before = raising(error)
    assert_ended(rig, error)


@pytest.mark.parametrize("error", OF_A_ROUND, ids=str)
def test_other_errors_end_the_round_s_requests_only(rig: Rig, error: Exception) -> None:
    rig.target.before = raising(error)
    assert {delta.request_id for delta in rig.engine.step()} == {1, 2}
    rig.target.before = lambda plan: None
    assert tokens_of(rig.run()[3]) == [TOKEN] * 9


@pytest.mark.parametrize("first", [KeyError("a request"), torch.OutOfMemoryError("CUDA out of memory.")], ids=str)
def test_a_device_that_fails_again_when_it_is_waited_for_cannot_be_used(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, first: Exception
) -> None:
    """Whatever was raised first, and whatever it raises then."""
    again = RuntimeError("the driver is gone")
    rig.target.before = raising(first)
    monkeypatch.setattr(rig.workers[1], "rest", raising(again))
    assert_ended(rig, again)


def test_a_device_that_fails_behind_the_verdict_ends_the_engine_when_its_times_are_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round's tokens are committed, and given out."""
    error = accelerator_error("an illegal memory access was encountered", 700)
    monkeypatch.setattr(rig.pace, "observe", raising(error))
    deltas = rig.engine.step()
    assert {delta.request_id for delta in deltas if delta.token_ids} == {1, 2}
    assert {delta.request_id for delta in deltas if delta.error} == {1, 2, 3}
    assert_refuses(rig, error)


def test_an_interruption_that_finds_a_failed_device_passes_through(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    error = accelerator_error("unspecified launch failure", 719)
    monkeypatch.setattr(rig.engine.workers, "collect", raising(KeyboardInterrupt()))
    monkeypatch.setattr(rig.workers[0], "rest", raising(error))
    with pytest.raises(KeyboardInterrupt):
        rig.engine.step()
    assert {delta.request_id for delta in rig.engine.take()} == {1, 2, 3}
    assert_refuses(rig, error)

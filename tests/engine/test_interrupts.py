"""The guard that keeps Ctrl-C out of a round."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from pearl.interrupts import InterruptGuard


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def usual_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


class Clock:
    """In the place of the module ``time``."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("pearl.interrupts.time", clock)
    return clock


def test_the_first_is_requested_one_a_second_later_is_passed_on(clock: Clock) -> None:
    with InterruptGuard() as guard:
        ctrl_c()
        assert guard.requested
        clock.now += 1.0
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()


def test_a_key_that_is_held_down_is_one_request(clock: Clock) -> None:
    """Terminals repeat it 30 times a second; a round that was cut in two by the second would end the engine."""
    with InterruptGuard() as guard:
        for _ in range(20):
            ctrl_c()
            clock.now += 0.04
        with pytest.raises(KeyboardInterrupt):
            guard.deliver()
        ctrl_c()  # a new request, with its own patience
        clock.now += 0.9
        ctrl_c()
        assert guard.requested


def test_delivered_once() -> None:
    with InterruptGuard() as guard:
        guard.deliver()
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            guard.deliver()
        guard.deliver()


def test_released_it_has_its_usual_effect() -> None:
    with InterruptGuard() as guard:
        guard.release()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        guard.hold()
        ctrl_c()
        assert guard.requested


def test_only_the_outer_one_holds_unless_it_is_released(clock: Clock) -> None:
    """So a later Ctrl-C is passed on at once however deep it arrives."""
    with InterruptGuard() as outer:
        with InterruptGuard() as inner:
            ctrl_c()
            assert (outer.requested, inner.requested) == (True, False)
            inner.deliver()
            clock.now += 1.0
            with pytest.raises(KeyboardInterrupt):
                ctrl_c()
        outer.release()
        with InterruptGuard() as inner:
            ctrl_c()
            assert inner.requested


def test_a_handler_of_the_host_program_gets_what_was_requested() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    with InterruptGuard() as guard:
        ctrl_c()
        assert not seen
        guard.deliver()
        assert seen == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_where_it_raises_nothing_a_guard_does_nothing(handler: signal.Handlers) -> None:
    signal.signal(signal.SIGINT, handler)
    with InterruptGuard():
        assert signal.getsignal(signal.SIGINT) is handler
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_in_another_thread_a_guard_does_nothing() -> None:
    handlers: list[object] = []

    def run() -> None:
        with InterruptGuard():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert handlers == [signal.default_int_handler]

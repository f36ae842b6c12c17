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


def test_the_first_is_requested_the_second_is_passed_on() -> None:
    with InterruptGuard() as guard:
        ctrl_c()
        assert guard.requested
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()


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


def test_only_the_outer_one_holds_unless_it_is_released() -> None:
    """So a second Ctrl-C is passed on at once however deep it arrives."""
    with InterruptGuard() as outer:
        with InterruptGuard() as inner:
            ctrl_c()
            assert (outer.requested, inner.requested) == (True, False)
            inner.deliver()
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

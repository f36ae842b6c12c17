"""What is worth a look, by how long ago and how often it was run."""

from __future__ import annotations

import math

from pearl.methods import Mode
from pearl.pace.looks import Looks
from pearl.pace.search import Choice


def choice(mode: Mode, window: int = 1, rate: float = 100.0) -> Choice:
    return Choice(mode, window, 0.0, rate, 1.0)


def test_plain_decoding_is_tried_in_any_case_other_modes_where_they_promise_nearly_as_much() -> None:
    looks = Looks()
    assert looks.hope_of_mode(3, choice("autoregressive", rate=0.1), 10, 0) == math.inf
    assert 120 < looks.hope_of_mode(3, choice("pearl"), 10, 0) < 130


def test_what_has_just_been_run_is_not_looked_at() -> None:
    looks = Looks()
    looks.note(3, choice("pearl", 4), 50)
    assert looks.hope_of_mode(3, choice("pearl", 4, 200.0), 100, 0) == 0.0
    assert looks.hope_of_mode(2, choice("pearl", 5), 100, 0) == 0.0  # in a batch of about that size, with any window
    assert looks.hope_of_mode(6, choice("pearl", 4), 100, 0) > 100
    assert looks.hope_of_window(3, choice("pearl", 4), 100) == 0.0
    assert looks.hope_of_window(3, choice("pearl", 5), 300) > 100


def test_doubt_grows_with_age_and_that_of_plain_decoding_shrinks_with_every_occasion() -> None:
    looks, plain = Looks(), choice("autoregressive")
    looks.note(3, choice("pearl"), 10)
    looks.note(3, plain, 10)
    young, old = (looks.hope_of_mode(3, choice("pearl"), now, 0) for now in (200, 2000))
    assert 100 < young < old < 120
    once = looks.hope_of_mode(3, plain, 200, 0)
    assert once > young + 30
    looks.note(3, plain, 16)  # it went on: the same occasion
    assert looks.hope_of_mode(3, plain, 206, 0) == once
    looks.note(3, plain, 1000)
    assert young < looks.hope_of_mode(3, plain, 1190, 0) < once - 20


def test_after_plain_decoding_a_look_waits_for_as_long_as_catching_up_is_dear() -> None:
    looks = Looks()
    looks.note(3, choice("pearl"), 10)
    assert looks.hope_of_mode(3, choice("pearl"), 1000, behind=0) > 100
    assert looks.hope_of_mode(3, choice("pearl"), 1000, behind=500) == 0.0
    assert looks.hope_of_mode(3, choice("pearl"), 5000, behind=500) > 100

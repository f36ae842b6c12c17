"""Races in the CUDA kernels: ThreadSanitizer finds none, and finds one where a barrier or fence is taken away.

``python -m cuda_emu.races`` takes each of them away in turn; here it is the first of each file.
"""

from __future__ import annotations

import re

import pytest
from cuda_emu import build, races
from cuda_emu.race_cases import CASES, ORDERING

pytestmark = [build.on_linux, pytest.mark.skipif(races.missing() is not None, reason=str(races.missing()))]

PLACES = races.places()
FIRST_PLACES = list({place.split(":")[0]: place for place in reversed(PLACES)}.values())
ORDERED = {" ".join(map(str, call)): racy for call, racy in ORDERING}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, races.Outcome]:
    """By source, place or kernel of ordering.cu."""
    jobs = {source: races.Job([source]) for source in races.KERNELS}
    jobs |= {place: races.removal(place) for place in FIRST_PLACES}
    jobs |= {case: races.Job(["ordering.cu"], case) for case in ORDERED}
    return dict(zip(jobs, races.search(list(jobs.values())), strict=True))


@pytest.mark.parametrize("case", ORDERED)
def test_what_orders_two_accesses(case: str, outcomes: dict[str, races.Outcome]) -> None:
    assert outcomes[case].status == (races.REPORTED if ORDERED[case] else 0), outcomes[case].text


@pytest.mark.parametrize("source", races.KERNELS)
def test_kernels_have_no_race(source: str, outcomes: dict[str, races.Outcome]) -> None:
    assert outcomes[source].status == 0, f"{outcomes[source].case}: {outcomes[source].text}"
    assert outcomes[source].case == list(CASES[source])[-1]  # all were run


@pytest.mark.parametrize("place", FIRST_PLACES)
def test_a_missing_barrier_is_reported(place: str, outcomes: dict[str, races.Outcome]) -> None:
    assert outcomes[place].status == races.REPORTED, f"nothing needs {place}: {outcomes[place].text}"
    assert re.search("ThreadSanitizer: data race", outcomes[place].text)


def test_every_barrier_says_what_it_is_for() -> None:
    """A comment beside it, or on the line above, names the hazard that it closes."""
    silent = []
    for place in PLACES:
        file, line = place.split(":")
        lines = (build.ROOT / "csrc" / "cuda" / file).read_text("utf-8").splitlines()
        above, text = lines[int(line) - 2 : int(line)]
        if "//" not in text and not above.lstrip().startswith("//"):
            silent.append(f"{place}: {text.strip()}")
    assert not silent

"""How many cores the draft gets beside the target, against all other splits of 2 to 16: a model of both forwards.

Work is counted in steps of the draft on one core. The draft's forward is small: each core more adds less (Amdahl). The
target's is ``c`` steps, and a row more costs 3 % of it; it uses every core that is free, up to ``reach``, beyond which
memory is no faster. A round of PEARL lasts as long as its longer forward, at the best window for each split.
"""

from __future__ import annotations

import itertools
import os
import statistics
from dataclasses import dataclass

import pytest

from pearl.config import EngineConfig

ROW = 0.03


@dataclass(frozen=True)
class Machine:
    cores: int
    reach: float  # cores that the target has a use for
    serial: float  # share of a draft's step that a second core does not help

    def drafting(self, tokens: int, threads: int) -> float:
        return tokens * (1 + self.serial * (threads - 1)) / threads

    def verifying(self, work: float, drafting: float, threads: int, divided: bool) -> float:
        """divided: the draft's cores stay empty when it has done; else the target's sleeping helpers wake for them."""
        beside = min(self.cores - threads, self.reach)
        alone = beside if divided else min(self.cores, self.reach)
        done = beside * drafting
        return work / beside if work <= done else drafting + (work - done) / alone


def speed(machine: Machine, c: float, holds: float, threads: int, divided: bool = False) -> float:
    """Tokens in the time of a step, at the best window."""
    best = 0.0
    for window in range(1, 17):
        drafting = machine.drafting(window, threads)
        rounds = [(1.0, 1, 1.0), (holds / (1 - holds**window), window, (1 - holds**window) / (1 - holds))]
        tokens = sum(weight * committed for weight, _, committed in rounds)
        seconds = 0.0
        for weight, rows, _ in rounds:
            work = c * (1 + ROW * (rows - 1))
            seconds += weight * max(drafting, machine.verifying(work, drafting, threads, divided))
        best = max(best, tokens / seconds)
    return best


@pytest.mark.parametrize(
    ("cores", "mean", "least"), [(2, 1.0, 1.0), (4, 0.95, 0.73), (8, 0.95, 0.75), (16, 0.94, 0.73)]
)
def test_a_quarter_is_near_the_best_split_whatever_the_pair(
    cores: int, mean: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least is a draft hardly smaller than its target, on cores of which it makes full use and the target not."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    draft, target = EngineConfig().resolve_threads()
    assert target == cores
    shares = []
    for reach, serial, c, holds in itertools.product((cores, cores / 2), (0.2, 0.6), (4, 8, 16, 32), (0.5, 0.7, 0.9)):
        machine = Machine(cores, reach, serial)
        every = {threads: speed(machine, c, holds, threads) for threads in range(1, cores)}
        # Helpers that take over what the draft leaves are never slower than cores of its own.
        assert every[draft] >= speed(machine, c, holds, draft, divided=True)
        shares.append(every[draft] / max(every.values()))
    assert statistics.fmean(shares) >= mean - 0.01
    assert min(shares) >= least - 0.01

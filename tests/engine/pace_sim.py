"""A batch of requests under true speeds and acceptance: the rounds of any pace, token by token."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from pearl.methods import METHODS, Intent, Mode, Progress
from pearl.pace import AutoPace, Load, MeasuredRound, PacePolicy, Progressed, Sizes
from pearl.pace.acceptance import Odds
from pearl.pace.curves import Times

LARGEST = 16  # window


@dataclass(frozen=True)
class Machine:
    """``beside``: by how much longer forwards take while both models work. ``wanders``: how far its speed does, as the
    standard deviation of a logarithm; ``for_long``: how many seconds a mood lasts.
    """

    step: float = 1.0
    base: float = 5.0
    row: float = 0.0
    overhead: float = 0.0
    beside: float = 1.0
    noise: float = 0.0
    draft_row: float = 0.0  # of a step's time, what each sequence beside the first adds
    hits: float = 0.0  # that a rejection finds its window, if any was prepared
    wanders: float = 0.0
    for_long: float = 1000.0

    def step_seconds(self, sequences: int, beside: bool) -> float:
        return self.step * (1 + self.draft_row * (sequences - 1)) * (self.beside if beside else 1.0)

    def target(self, rows: float, beside: bool) -> float:
        return (self.base + self.row * rows) * (self.beside if beside else 1.0)

    def times(self, beside: bool) -> Times:
        factor = self.beside if beside else 1.0
        points = ((1.0, self.target(1, beside)), (1000.0, self.target(1000, beside)))
        steps = ((1.0, self.step_seconds(1, beside)), (1000.0, self.step_seconds(1000, beside)))
        return Times(points, self.row * factor, steps)


@dataclass
class _Request:
    id: int
    pending: int = 0
    corrected: bool = True
    tokens: int = 0


@dataclass
class Batch:
    """``odds(request, round)``: that a token holds, the first after a correction and later ones. ``lasting``: tokens of
    a request, after which another one comes; 0: for ever.
    """

    machine: Machine
    size: int
    odds: Callable[[int, int], Odds]
    pinned: bool = False
    seed: int = 0
    lasting: int = 0
    requests: list[_Request] = field(default_factory=list)

    def serve(self, policy: PacePolicy, rounds: int) -> Iterator[tuple[int, float]]:
        """Tokens and seconds of each round, as the machine usually needs."""
        moods, mood = random.Random(self.seed), 0.0
        rng, self.requests = random.Random(self.seed), [_Request(index) for index in range(self.size)]
        for number in range(rounds):
            self._renew()
            ids = [request.id for request in self.requests]
            pace = policy.decide(ids, Load(self.size, 100 * self.size), self.pinned)
            progress = [Progress(request.pending, False) for request in self.requests]
            intents = METHODS[pace.mode].intents(progress)
            if self.pinned:
                intents = [intent.pinned(p) for intent, p in zip(intents, progress, strict=True)]
            found, rows, steps, sequences = [], 0, 0, 0
            prepared = pace.branches if any(intent.draft and intent.verify for intent in intents) else 0
            self.rejections = self.found = 0
            for index, (intent, window) in enumerate(zip(intents, pace.windows, strict=True)):
                steps, sequences = (max(steps, window), sequences + 1) if intent.draft else (steps, sequences)
                rows += self._rows(index, intent)
                found.append(self._judge(index, intent, window, self.odds(ids[index], number), rng))
                if prepared and intent.draft and found[-1].accepted < found[-1].tested:
                    self._look_up(index, window, rng)
            measured = self._measure(pace.mode, rows, sequences, steps, found, rng, prepared)
            if policy.listens:
                policy.observe(_in_a_mood(measured, math.exp(mood)))
            yield sum(f.committed for f in found), measured.seconds
            kept = math.exp(-measured.seconds / self.machine.for_long)
            mood = kept * mood + math.sqrt(1 - kept**2) * moods.gauss(0.0, self.machine.wanders)

    def _renew(self) -> None:
        for index, request in enumerate(self.requests):
            if self.lasting and request.tokens >= self.lasting:
                self.requests[index] = _Request(max(r.id for r in self.requests) + 1)

    def _look_up(self, index: int, window: int, rng: random.Random) -> None:
        """Whether the window behind a correction was prepared."""
        hit = rng.random() < self.machine.hits
        self.rejections, self.found = self.rejections + 1, self.found + hit
        if hit:
            self.requests[index].pending = window

    def _rows(self, index: int, intent: Intent) -> int:
        return self.requests[index].pending + (intent.draft or intent.bonus) if intent.verify else 0

    def _judge(self, index: int, intent: Intent, window: int, odds: Odds, rng: random.Random) -> Progressed:
        request = self.requests[index]
        drafted = window if intent.draft else 0
        if not intent.verify:
            request.pending += drafted
            return Progressed(request.id, 0, 0, 0)
        tested = request.pending + bool(drafted)
        accepted = 0
        while accepted < tested and rng.random() < (odds.first if request.corrected else odds.later):
            accepted, request.corrected = accepted + 1, False
        own = accepted < tested or (not drafted and intent.bonus)
        request.corrected = request.corrected or own
        request.pending = drafted - 1 if drafted and accepted == tested else 0
        request.tokens += accepted + own
        return Progressed(request.id, tested, accepted, accepted + own)

    def _measure(
        self,
        mode: str,
        rows: int,
        sequences: int,
        steps: int,
        found: list[Progressed],
        rng: random.Random,
        prepared: int = 0,
    ) -> MeasuredRound:
        machine, both = self.machine, bool(rows and steps)
        target = machine.target(rows, both) * rng.lognormvariate(0, machine.noise) if rows else 0.0
        step = machine.step_seconds(max(1, sequences + prepared), both) * rng.lognormvariate(0, machine.noise)
        seconds = max(target, steps * step) + machine.overhead
        load = Load(self.size, 100 * self.size)
        return MeasuredRound(  # type: ignore[call-arg]
            mode, load, rows, target, sequences + prepared, steps, steps * step, seconds, tuple(found),  # type: ignore[arg-type]
            prepared, self.rejections, self.found,
        )  # fmt: skip


def _in_a_mood(measured: MeasuredRound, factor: float) -> MeasuredRound:
    return measured._replace(
        target_seconds=measured.target_seconds * factor,
        draft_seconds=measured.draft_seconds * factor,
        seconds=measured.seconds * factor,
    )


def speed(rounds: Iterator[tuple[int, float]]) -> float:
    """Tokens per second."""
    tokens, seconds = zip(*rounds, strict=True)
    return float(sum(tokens)) / sum(seconds)


def served(policy: PacePolicy, batch: Batch, rounds: int, skip: int) -> float:
    """Tokens per second of the rounds after the first ``skip``."""
    return speed(itertools.islice(batch.serve(policy, rounds), skip, None))


def auto(machine: Machine, modes: Sequence[Mode] = tuple(METHODS)) -> AutoPace:
    """As an engine makes it: what is known at first is how many bytes each model has."""
    return AutoPace(modes, LARGEST, Sizes(int(machine.base * 1e6), int(machine.step * 1e6)))

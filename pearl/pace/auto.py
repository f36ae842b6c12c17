"""The pace with the largest predicted speed, from what was measured while serving.

It decides anew every few rounds, keeps what it has unless another pace is better by more than the measurement's own
scatter, and now and then runs what it has not measured for long, if that promises nearly as much.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np

from pearl.methods import Mode
from pearl.pace.acceptance import Acceptance, Odds
from pearl.pace.calibration import Calibration, Stretch
from pearl.pace.curves import Curves, Numbers, Sizes
from pearl.pace.hits import Hits
from pearl.pace.hopes import Hopes
from pearl.pace.looks import Looks
from pearl.pace.rounds import Load, MeasuredRound, Pace
from pearl.pace.search import Choice, Search
from pearl.pace.speed import Situation

_SOON, _BETWEEN_CHOICES = 6, 64  # rounds until the next choice: after another mode was taken, and at last
_WORTH = 200  # times what a choice costs, at least, until the next one
_HEARD, _FEWEST_HEARD = 64, 16  # rounds before a choice that it learns from: of one request, and of many
_MARGIN = 0.01  # by which another pace must be better; another mode beside the scatter
_MARGIN_TO_DRAFT = 0.05  # likewise after plain decoding: the draft must first catch up with all tokens since then
_PROBED = 3  # rounds that tell how long forwards take in a state of the other model
_WORTH_FOR_NEW = 50  # times what a choice costs, at least, before new requests get one of their own
_LINGERING = 16  # rounds that a batch that became smaller keeps its mode: it may be at its end, where no change pays
_WARMING = 2  # rounds after another mode in which threads wake and caches fill
_SETTLING = 6  # rounds until a mode is in its steady state
_ALIKE = 0.1  # by which batches may differ to which a prediction applies
_LATELY, _STALL = 16, 2.0  # rounds, and times the longest of them: what takes longer is the machine, or a collection
_LEVELS = np.array([8.0, 16.0])  # of odds: requests on the same ones are predicted together

# While the other model rests, or works.
_TAKES_TURNS: frozenset[Mode] = frozenset({"autoregressive", "speculative"})
# For one request: among several their formulas are coarse, and another mode is at least as fast.
_ALONE: frozenset[Mode] = frozenset({"whole-windows", "pre-verify-only"})


@dataclass(frozen=True)
class _Decision:
    """What holds for batches of a size until the round ``until``. A request without a window gets the typical one."""

    choice: Choice
    windows: Mapping[int, int]
    typical: int
    until: int
    best: Choice  # what was chosen, where ``choice`` is only looked at
    span: int  # rounds that a choice is kept

    @property
    def looks(self) -> bool:
        return self.choice.mode != self.best.mode


class AutoPace:
    """``modes``: those that may be chosen; ``largest``: the longest window; ``most_prepared``: windows that may be
    prepared in a round.
    """

    changes = True

    def __init__(self, modes: Sequence[Mode], largest: int, sizes: Sizes, most_prepared: int = 0) -> None:
        self._modes, self._hits = tuple(modes), Hits()
        self._search = Search(largest, most_prepared, self._hits)
        self._curves, self._acceptance, self._calibration = Curves(sizes), Acceptance(), Calibration()
        self._decisions: dict[tuple[int, bool], _Decision] = {}  # by size of batch, and whether it is pinned
        self._latest: _Decision | None = None
        self._running: Choice | None = None
        self._running_for = 0  # requests, which it was chosen for
        self._since = 0  # the round in which its mode began
        self._looks, self._hopes, self._stretch = Looks(), Hopes(), Stretch()
        self._asked, self._heard = 0, 0  # rounds in all, and the latest of them that was learnt from
        self._chosen = 0  # and the latest with a choice
        self._deciding, self._round = 0.0, 0.0  # seconds that a choice takes, and a round
        self._lately: deque[float] = deque(maxlen=_LATELY)  # seconds of rounds
        self._rounds = 0  # that could be learnt from; where nothing is, all
        self._until = 0  # of the latest decision
        self._size, self._lingered = 0, 0  # the batch's, as a power of two, and its rounds of plain decoding since then

    @property
    def listens(self) -> bool:
        heard = max(_HEARD // max(1, self._running_for), _FEWEST_HEARD)
        return self._rounds >= self._until - heard

    def decide(self, request_ids: Sequence[int], load: Load, pinned: bool) -> Pace:
        if not request_ids:
            return Pace(self._modes[0], ())
        self._asked += 1
        self._rounds += not self.listens  # the others are counted when they are observed
        if self._latest is not None and self._lingers(load):
            self._looks.note(load.batch.bit_length(), self._latest.choice, self._rounds)
            return self._paced(self._latest, request_ids)
        key = load.batch.bit_length(), pinned
        decision = self._decisions.get(key)
        if decision is not None and self._are_new(request_ids, decision):
            self._hopes.renew()
            decision = replace(decision, until=0)
        if decision is None or self._rounds >= decision.until:
            begin, self._chosen = time.perf_counter(), self._asked
            self._decisions[key] = decision = self._decide(request_ids, load, pinned, decision or self._latest)
            self._deciding = time.perf_counter() - begin
        self._latest, self._until = decision, decision.until
        if self._running is None or self._running.mode != decision.choice.mode:
            self._since = self._rounds
        if self._running is not decision.choice:
            self._stretch.break_off()
        self._running, self._running_for = decision.choice, len(decision.windows)
        self._hopes.note(decision.choice.mode, self._asked)
        return self._paced(decision, request_ids)

    def _are_new(self, ids: Sequence[int], decision: _Decision) -> bool:
        """Whether plain decoding was chosen for none of these requests, whose texts may be others, and is paid for."""
        if decision.best.mode != "autoregressive" or not decision.windows.keys().isdisjoint(ids):
            return False
        return (self._asked - self._chosen) * self._round >= _WORTH_FOR_NEW * self._deciding

    def _paced(self, decision: _Decision, request_ids: Sequence[int]) -> Pace:
        choice, windows, typical = decision.choice, decision.windows, decision.typical
        own = tuple([windows.get(i, typical) for i in request_ids])
        return Pace(choice.mode, own, choice.rate / self._curves.mood.factor, choice.prepared)

    def _lingers(self, load: Load) -> bool:
        """Whether the batch became smaller a moment ago, and could go on as it is."""
        size, running = load.batch.bit_length(), self._running
        alone = load.batch == 1 and running is not None and running.mode == "two-halves"
        if size >= self._size or alone or self._lingered >= _LINGERING:
            self._size, self._lingered = size, 0
            return False
        self._lingered += 1
        return True

    def observe(self, measured: MeasuredRound) -> None:
        if self._asked != self._heard + 1:
            self._stretch.break_off()
        if self._asked > self._heard + _FEWEST_HEARD:
            self._curves.mood.look_away()
        self._heard = self._asked
        seconds = self._without_stall(measured.seconds)
        steady = self._rounds - self._since >= _WARMING and seconds == measured.seconds
        self._curves.observe(measured, steady, self._latest is not None and self._latest.looks)
        self._rounds += 1
        self._acceptance.observe(measured.requests, self._asked)
        if measured.prepared:
            self._hits.observe(measured.prepared / measured.load.batch, measured.rejections, measured.hits)
        self._round += (seconds - self._round) / min(_BETWEEN_CHOICES, self._curves.rounds)
        self._judge(measured, seconds / self._curves.felt)

    def _judge(self, measured: MeasuredRound, seconds: float) -> None:
        """What was predicted, by what came of it. ``seconds``: as the round usually takes: how fast the machine was is
        no fault of a prediction.
        """
        running = self._running
        for_these = abs(measured.load.batch - self._running_for) <= _ALIKE * self._running_for
        known = running is not None and running.informed and running.mode == measured.mode
        if running is None or not (known and for_these and self._settled()):
            self._stretch.break_off()
            return
        stretch = self._stretch.add(sum(request.committed for request in measured.requests), seconds)
        if stretch is not None:
            self._calibration.observe(running.mode, *stretch, running.predicted, measured.load.batch)

    def _without_stall(self, seconds: float) -> float:
        """A stall of a tenth of a second would outweigh a hundred rounds, to the harm of the mode in which it fell."""
        if self._lately:
            seconds = min(seconds, _STALL * max(self._lately))
        self._lately.append(seconds)
        return seconds

    def _settled(self) -> bool:
        """Whether requests are no longer in the state in which another mode left them."""
        return self._rounds - self._since > _SETTLING

    def _decide(self, ids: Sequence[int], load: Load, pinned: bool, before: _Decision | None) -> _Decision:
        odds = self._acceptance.odds(ids, self._asked)
        now = self._situation(odds, load, pinned)
        modes = [mode for mode in self._modes if load.batch == 1 or mode not in _ALONE] or self._modes
        choices = {mode: self._best(mode, now) for mode in modes}
        known = before is not None and before.best.mode in choices
        best = self._choose(choices, self._again(before.best, now) if before and known else None, load)
        probe = self._probe(choices, best, now, load)
        if probe is None and best.mode == "autoregressive" and self._may_hope(ids, load):
            hoped = self._acceptance.hoped(ids, odds, self._hopes.errors(load.batch, self._asked))
            probe = self._hope(best, modes, now, hoped)
        choice = probe or best
        windows = dict(zip(ids, choice.windows(odds), strict=True))
        choice = replace(choice, informed=self._is_informed(choice.mode, sum(windows.values()), load))
        span = self._span(before, best, probe is not None)
        until = self._rounds + (_SOON if probe or not choice.informed else span)
        if choice.mode == "autoregressive" and (waits := self._hopes.waits(self._asked)):
            until = min(until, self._rounds + max(waits, _SOON))
        self._looks.note(load.batch.bit_length(), choice, until)
        return _Decision(choice, windows, self._typical(choice, windows, now), until, best, span)

    def _typical(self, choice: Choice, windows: Mapping[int, int], now: Situation) -> int:
        """The window of requests that come before the next choice. One that ran alone says little of them."""
        if len(windows) > 1 or choice.mode == "autoregressive":
            return sorted(windows.values())[len(windows) // 2]
        odds = self._acceptance.of_a_new_one
        return self._best(choice.mode, replace(now, first=np.array([odds.first]), later=np.array([odds.later]))).longest

    def _span(self, before: _Decision | None, best: Choice, looks: bool) -> int:
        """Twice as long each time that a mode stays the best, until choosing costs little of the time."""
        if before is None or before.best.mode != best.mode:
            return _SOON
        longest = _BETWEEN_CHOICES
        if self._round:
            longest = max(longest, int(_WORTH * self._deciding / self._round))
        return before.span if looks else min(2 * before.span, longest)

    def _choose(self, choices: Mapping[Mode, Choice], before: Choice | None, load: Load) -> Choice:
        """The fastest; the one from before unless that is faster by more than what is measured scatters. Among windows
        of a mode that does not matter: they are predicted from the same times, and nothing is lost on the way.
        """
        best = max(choices.values(), key=lambda choice: choice.rate)
        if before is None:
            return best
        margin = _MARGIN
        if best.mode != before.mode:
            margin = (_MARGIN_TO_DRAFT if before.mode == "autoregressive" else _MARGIN) + 2 * self._curves.spread(load)
        return best if best.rate >= before.rate * (1 + margin) else before

    def _situation(self, odds: Sequence[Odds], load: Load, pinned: bool) -> Situation:
        return Situation(
            *_classes(odds),
            self._curves.times(load, beside=False),
            self._curves.times(load, beside=True),
            {mode: self._curves.overhead(load.batch, mode) for mode in self._modes},
            pinned,
        )

    def _best(self, mode: Mode, now: Situation) -> Choice:
        return self._search.best(mode, now, self._calibration.factor(mode, round(now.batch)))

    def _again(self, choice: Choice, now: Situation) -> Choice:
        return self._search.again(choice, now, self._calibration.factor(choice.mode, round(now.batch)))

    def _probe(self, choices: Mapping[Mode, Choice], chosen: Choice, now: Situation, load: Load) -> Choice | None:
        """A choice that tells what is not known: how long forwards take alone, or beside each other, which all other
        predictions hang on; then what promises nearly as much and was not run for long (``Looks``).
        """
        for alone in (True, False):
            there = [choice for mode, choice in choices.items() if (mode in _TAKES_TURNS) == alone]
            if alone and "speculative" in choices:  # autoregressive decoding tells nothing of the draft
                there = [choices["speculative"]]
            if there and not self._knows(load, alone):
                return max(there, key=lambda choice: choice.rate)
        size, looks = load.batch.bit_length(), self._looks
        behind = load.context // load.batch if chosen.mode == "autoregressive" else 0
        hopes = [
            (looks.hope_of_mode(size, choice, self._rounds, behind), choice)
            for mode, choice in choices.items()
            if mode != chosen.mode
        ]
        hopes += [
            (looks.hope_of_window(size, choice, self._rounds), choice) for choice in self._search.others(chosen, now)
        ]
        most, candidate = max(hopes, key=itemgetter(0), default=(0.0, None))
        return candidate if most > chosen.rate else None

    def _may_hope(self, ids: Sequence[int], load: Load) -> bool:
        alone = load.batch == 1 and self._acceptance.has_tested(ids)  # then the draft lacks a few tokens at most
        behind = 0 if alone else load.context // load.batch
        return not self._hopes.waits(self._asked) and self._hopes.allows(behind, load.batch, self._asked)

    def _hope(self, plain: Choice, modes: Sequence[Mode], now: Situation, hoped: Sequence[Odds]) -> Choice | None:
        """What would be faster than plain decoding if drafted tokens held as often as is ``hoped``."""
        first, later, count = _classes(hoped)
        then = replace(now, first=first, later=later, count=count)
        choices = [self._best(mode, then) for mode in modes if mode != plain.mode]
        best = max(choices, key=lambda choice: choice.rate, default=plain)
        if best.rate <= plain.rate:
            return None
        self._hopes.try_it(self._asked)
        return self._again(best, now)

    def _is_informed(self, mode: Mode, drafted: int, load: Load) -> bool:
        """Whether the prediction rests on measured times, not on what rows might cost that nobody has seen."""
        alone = mode in _TAKES_TURNS
        rows = load.batch if mode == "autoregressive" else drafted
        return self._knows(load, alone) and self._curves.covers(load, not alone, rows)

    def _knows(self, load: Load, alone: bool) -> bool:
        return self._curves.knows(load, beside=not alone, rounds=_PROBED)


def _classes(odds: Sequence[Odds]) -> tuple[Numbers, Numbers, Numbers]:
    """``[C]`` each: the two odds of requests that are predicted together, and how many these are."""
    levels = np.array(odds) * _LEVELS
    classes, count = np.unique(np.round(levels) if len(odds) > 1 else levels, axis=0, return_counts=True)
    first, later = np.clip(classes / _LEVELS, 0.01, 0.99).T
    return first, later, count.astype(np.float64)

"""The studies: which setups answer which questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from bench.evaluation import setups
from bench.evaluation.data_sets import Question
from bench.evaluation.heats import Heat
from bench.evaluation.setups import Setup, Windows


@dataclass(frozen=True)
class Field:
    """What there is to compare with: a draft model or head, one that prepares windows, one that phrases may follow;
    ``share``: options of the second baseline, if there is one. windows: the best fixed ones; None while they are not
    known, and without a draft.
    """

    has_draft: bool
    prepares: bool
    phrases: bool
    share: Mapping[str, Any] | None
    windows: Windows | None
    candidates: tuple[int, ...]
    batches: tuple[int, ...]
    temperatures: tuple[float, ...]
    other_drafts: tuple[str, ...] = ()  # that are compared too

    @property
    def drafting(self) -> list[Setup]:
        return [] if self.windows is None else setups.drafting(self.windows, self.prepares, self.phrases)

    @property
    def best(self) -> list[Setup]:
        """The main methods, each at its best fixed window, then with the pace's."""
        if self.windows is None:
            return setups.prompt_lookup()[:2]
        paced = Setup("speculative", {"method": "speculative"}), Setup("pearl", {"method": "pearl"})
        fixed = (setups.fixed("speculative", self.windows.speculative), setups.fixed("pearl", self.windows.pearl))
        return [*fixed, *paced]


def methods(field: Field, names: Sequence[str] | None = None) -> list[Setup]:
    """All of the paper's and those beside; ``names``: only these, beside the baseline. The first is the baseline."""
    found = [setups.plain()]
    if field.share is not None:
        found.append(Setup(setups.SHARE, field.share, engine="apart"))
    found += [*field.drafting, *setups.other_drafts(field.other_drafts), *setups.prompt_lookup(), *setups.others()]
    return found if names is None else [found[0], *(s for s in found[1:] if s.name in names)]


def _one_by_one(questions: Sequence[Question], chosen: Sequence[Setup]) -> list[Heat]:
    return [Heat((question,), tuple(chosen), len(question.turns)) for question in questions]


def _first_turns(questions: Sequence[Question], chosen: Sequence[Setup]) -> list[Heat]:
    return [Heat((question,), tuple(chosen)) for question in questions]


def _search(field: Field, questions: Sequence[Question]) -> list[Heat]:
    return _first_turns(questions, [setups.plain(), *setups.searched(field.candidates)])


def _windows(field: Field, questions: Sequence[Question]) -> list[Heat]:
    return _search(field, questions)


def _ablation(field: Field, questions: Sequence[Question]) -> list[Heat]:
    """At one window, PEARL's best."""
    assert field.windows is not None
    window = field.windows.pearl
    pair = [setups.without_pre_verify(window), setups.without_post_verify(window)]
    both = [setups.fixed("speculative", window), *pair, setups.fixed("pearl", window)]
    return _one_by_one(questions, [setups.plain(), *both])


def _batches(field: Field, questions: Sequence[Question]) -> list[Heat]:
    """The same number of questions at once, and one after another."""
    heats = []
    for data_set in dict.fromkeys(question.data_set for question in questions):
        own = [question for question in questions if question.data_set == data_set]
        for batch in field.batches:
            chosen = tuple(setups.at(setup, batch) for setup in [setups.plain(), *field.best])
            heats.append(Heat(tuple(islice(cycle(own), batch)), chosen))
    return heats


def _temperatures(field: Field, questions: Sequence[Question]) -> list[Heat]:
    """Rejection against coupling, at PEARL's best window."""
    assert field.windows is not None
    pearl = setups.fixed("pearl", field.windows.pearl)
    coupled = Setup(f"{pearl.name} coupled", {**pearl.options, "verification": "coupled"})
    speculative = setups.fixed("speculative", field.windows.speculative)
    return [
        heat
        for question in questions
        for temperature in field.temperatures
        for heat in _first_turns(
            [question], [setups.at(s, temperature=temperature) for s in (setups.plain(), speculative, pearl, coupled)]
        )
    ]


def _anatomy(field: Field, questions: Sequence[Question]) -> list[Heat]:
    chosen = [s for s in field.drafting if s.guesses is None and s.options.get("verification") is None]
    return _one_by_one(questions, [setups.plain(), *(chosen or field.best)])


def _turns(field: Field, questions: Sequence[Question]) -> list[Heat]:
    return _one_by_one([question for question in questions if len(question.turns) > 1], [setups.plain(), *field.best])


@dataclass(frozen=True)
class Study:
    """``drafts``: it needs a draft model; ``searches``: it needs the best windows first."""

    heats: Callable[[Field, Sequence[Question]], list[Heat]]
    title: str
    drafts: bool = True
    searches: bool = True


STUDIES: Mapping[str, Study] = {
    "search": Study(_search, "The best fixed windows", searches=False),
    "windows": Study(_windows, "Every fixed window, beside what is predicted", searches=False),
    "ablation": Study(_ablation, "PEARL without each of its halves"),
    "batches": Study(_batches, "Requests at once", drafts=False),
    "temperatures": Study(_temperatures, "Temperatures: rejection against coupling"),
    "anatomy": Study(_anatomy, "What rounds are made of", drafts=False),
    "turns": Study(_turns, "Conversations: the second turn beside the first", drafts=False),
    "methods": Study(lambda field, questions: _one_by_one(questions, methods(field)), "All methods", drafts=False),
}

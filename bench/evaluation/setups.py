"""What competes: an engine, its options, what it drafts with; the paper's methods, and those beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

REFERENCE = "autoregressive"
SHARE = "autoregressive, target's share"
PREPARED = 4  # windows that a round prepares, of the contestant that has a fixed number of them
GUESS_WINDOW = 8  # rows that a guess costs next to nothing
PHRASE = 4  # tokens that a phrase adds to a drafted window

# pearl: a variant of the shared LLM. apart: an LLM of its own. The others are not this engine's.
EngineName = Literal["pearl", "apart", "transformers", "transformers assisted", "llama.cpp"]


@dataclass(frozen=True)
class Setup:
    """``options``: of ``LLM.variant``, or of ``LLM`` where it stands apart. guesses: what candidates come from, beside
    or instead of the draft. base: the setup that speedups are over.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineName = "pearl"
    guesses: Literal["lookahead", "phrases"] | None = None
    batch: int = 1
    temperature: float = 0.0
    base: str = REFERENCE

    @property
    def exact(self) -> bool:
        """Whether its answers must be the base's, token for token."""
        return self.temperature == 0 or self.options.get("verification") == "coupled" or self.name == self.base


@dataclass(frozen=True)
class Windows:
    """The best fixed ones."""

    speculative: int
    pearl: int


def at(setup: Setup, batch: int = 1, temperature: float = 0.0) -> Setup:
    """The same under another load, beside plain decoding under that load."""
    load = f", batch {batch}" if batch > 1 else ""
    load += f", T={temperature:g}" if temperature else ""
    return replace(setup, name=setup.name + load, batch=batch, temperature=temperature, base=setup.base + load)


def searched(candidates: Sequence[int]) -> list[Setup]:
    """What the windows are found with."""
    return [fixed(method, window) for window in candidates for method in ("speculative", "pearl")]


def fixed(method: str, window: int) -> Setup:
    options: dict[str, Any] = {"method": method, "window": window, "prepared_windows": 0}
    return Setup(f"{method}@{window}", options)


def without_pre_verify(window: int) -> Setup:
    return Setup(f"pearl@{window} without pre-verify", {**fixed("pearl", window).options, "pre_verify": False})


def without_post_verify(window: int) -> Setup:
    return Setup(f"pearl@{window} without post-verify", {**fixed("pearl", window).options, "post_verify": False})


def plain() -> Setup:
    return Setup(REFERENCE, {"method": "autoregressive"})


def prompt_lookup() -> list[Setup]:
    return [
        Setup("n-gram speculative", {"method": "speculative", "draft": "ngram"}),
        Setup("n-gram pearl", {"method": "pearl", "draft": "ngram"}),
        Setup("lookahead", {"method": "speculative", "draft": "ngram", "window": GUESS_WINDOW}, guesses="lookahead"),
    ]


def drafting(windows: Windows, prepares: bool, phrases: bool = True) -> list[Setup]:
    """With a draft model or head. ``prepares``: whether it can prepare windows; ``phrases``: whether they can follow
    what it drafts, which a head's next window would have no features for.
    """
    pearl = fixed("pearl", windows.pearl)
    phrased = {"method": "speculative", "window": windows.speculative + PHRASE, "prepared_windows": 0}
    found = [
        fixed("speculative", windows.speculative),
        pearl,
        Setup("pearl", {"method": "pearl"}),
        without_pre_verify(windows.pearl),
        without_post_verify(windows.pearl),
        Setup("coupled", {"method": "pearl", "verification": "coupled"}),
    ]
    if phrases:
        found.append(Setup("ouroboros-like phrases", phrased, guesses="phrases"))
    if prepares:
        found.insert(3, Setup(f"{pearl.name}+{PREPARED}", {**pearl.options, "prepared_windows": PREPARED}))
    return found


def other_drafts(drafts: Sequence[str]) -> list[Setup]:
    """Each in an LLM of its own, at the pace's windows."""
    return [
        Setup(f"{Path(draft).name} {method}", {"method": method, "draft": draft}, engine="apart")
        for draft in drafts
        for method in ("speculative", "pearl")
    ]


def others() -> list[Setup]:
    """Engines that are not this one."""
    names: tuple[EngineName, ...] = ("transformers", "transformers assisted", "llama.cpp")
    return [Setup(name, engine=name) for name in names]

"""What crosses between the engine and a pace, once a round."""

from __future__ import annotations

from typing import NamedTuple

from pearl.methods import Mode

_FEW = 512


class Load(NamedTuple):
    batch: int
    context: int  # tokens of all its requests

    @property
    def bucket(self) -> tuple[int, int]:
        """Powers of two: of the batch, and of the tokens of a request, which matter little while they are few."""
        return self.batch.bit_length(), (self.context // max(1, self.batch) // _FEW).bit_length()


class Pace(NamedTuple):
    """What a batch does in a round. ``windows``: tokens to draft for each request, at least 1.

    ``tokens_per_second``: of the batch, as predicted; 0 where nothing was. ``branches``: windows to prepare, of all
    requests together; ``branch_window``: tokens of each, at most, 0: as many as its request drafts.
    """

    mode: Mode
    windows: tuple[int, ...]
    tokens_per_second: float = 0.0
    branches: int = 0
    branch_window: int = 0


class Progressed(NamedTuple):
    """What a round found of one request: of ``tested`` tokens, in order, the first ``accepted`` held."""

    request_id: int
    tested: int
    accepted: int
    committed: int


class MeasuredRound(NamedTuple):
    """A round in which every request only decoded: nothing was compiled, captured or computed of a prompt.

    load: the running batch. target_rows: of the target's forward in all; draft_sequences, draft_steps: of the draft's,
    prepared windows among them. Seconds are 0 where a model did not work; ``seconds`` is the whole round.
    prepared: windows that were; rejections, hits: verdicts that drafted tokens fell at, where a window could have been
    prepared, and where the right one was.
    """

    mode: Mode
    load: Load
    target_rows: int
    target_seconds: float
    draft_sequences: int
    draft_steps: int
    draft_seconds: float
    seconds: float
    requests: tuple[Progressed, ...]
    prepared: int = 0
    rejections: int = 0
    hits: int = 0

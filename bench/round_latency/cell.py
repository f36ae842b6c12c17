"""One cell of the latency benchmark: a batch at a context, with every method, in rounds that only decode.

The context is not computed, which would take longer than all the rounds: prompts are registered in the prefix cache,
and the requests find their keys and values there, which are the random numbers that KV memory was filled with.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from bench.round_latency.report import Latencies
from pearl.bench.measure import seconds_alone
from pearl.bench.scripted_verdicts import scripted
from pearl.bench.shapes import random_prompts
from pearl.choices import MethodName
from pearl.config import EngineConfig
from pearl.engine.model_loading import LoadedModels
from pearl.engine.rounds import RoundRecord
from pearl.errors import RoundError
from pearl.kv import KVCacheManager
from pearl.llm import LLM
from pearl.outputs import OutputDelta
from pearl.sampling_params import SamplingParams


class Interrupted(Exception):
    """The user wants no more."""


class RoundFailed(RoundError):
    """The engine gave up on the requests; the message is the engine's."""


class _Enough(Exception):
    pass


@dataclass(frozen=True)
class Load:
    """What to measure: ``context`` tokens of each of ``batch`` requests are in the cache. See ``Latencies``."""

    batch: int
    context: int
    window: int
    rounds: int
    acceptance: float

    @property
    def max_tokens(self) -> int:
        """More than the rounds can commit, so that the batch stays full."""
        return (self.rounds + 1) * (self.window + 1)

    @property
    def max_model_len(self) -> int:
        return self.context + 1 + self.max_tokens

    def config(self, base: EngineConfig) -> EngineConfig:
        """Of all shapes a cell has few, and its rounds come twice: nothing is captured before."""
        return replace(
            base,
            window=self.window,
            max_num_seqs=self.batch,
            max_model_len=self.max_model_len,
            prefix_caching=True,
            capture_seconds=0,
        )

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """A token more than the context: at least one is always computed."""
        return random_prompts([self.context + 1] * self.batch, vocab_size)


def measure(models: LoadedModels, config: EngineConfig, load: Load, stopped: Callable[[], bool]) -> Latencies:
    """``models``: assembled for ``load.config``, idle. Raises Interrupted, RoundFailed, or torch's OutOfMemoryError."""
    plain, _ = _run(models, config, "autoregressive", load, stopped)
    in_turns, _ = _run(models, config, "speculative", load, stopped)
    pearl, alone = _run(models, config, "pearl", load, stopped, replay=True)
    return summarise(load, {"autoregressive": plain, "speculative": in_turns, "pearl": pearl}, alone)


def summarise(
    load: Load, records: Mapping[MethodName, Sequence[RoundRecord]], alone: Sequence[tuple[float, float]]
) -> Latencies:
    """``alone``: seconds of the target's and the draft's forward in each of PEARL's rounds, computed again alone."""
    plain, in_turns, pearl = records["autoregressive"], records["speculative"], records["pearl"]
    drafts = [r for r in in_turns if r.plan.draft.work]
    verifications = [r for r in in_turns if r.plan.target.work]
    whole: dict[MethodName, list[float]] = {
        "autoregressive": [r.whole.seconds for r in plain],
        "speculative": [d.whole.seconds + v.whole.seconds for d, v in zip(drafts, verifications, strict=True)],
        "pearl": [r.whole.seconds for r in pearl],
    }
    return Latencies(
        decode_ms=_median_ms(r.target.seconds for r in plain),
        verify_ms=_median_ms(r.target.seconds for r in verifications),
        draft_window_ms=_median_ms(r.proposal.busy.seconds for r in drafts),
        speculative_round_ms=_median_ms(whole["speculative"]),
        pearl_round_ms=_median_ms(whole["pearl"]),
        pearl_target_ms=_median_ms(r.target.seconds for r in pearl),
        pearl_draft_ms=_median_ms(r.proposal.busy.seconds for r in pearl),
        round_over_longer=_median_ratio(whole["pearl"], [max(pair) for pair in alone]),
        round_over_longer_together=_median_ratio(
            whole["pearl"], [max(r.target.seconds, r.proposal.busy.seconds) for r in pearl]
        ),
        overlap=_median_ratio([sum(pair) for pair in alone], whole["pearl"]),
        tok_s={method: _tokens(records[method]) / sum(seconds) for method, seconds in whole.items()},
        tok_s_expected={
            method: load.batch * expected_tokens(method, load.acceptance, load.window) / statistics.mean(seconds)
            for method, seconds in whole.items()
        },
        acceptance_rate={"speculative": _acceptance(in_turns), "pearl": _acceptance(pearl)},
    )


def _run(
    models: LoadedModels,
    config: EngineConfig,
    method: MethodName,
    load: Load,
    stopped: Callable[[], bool],
    replay: bool = False,
) -> tuple[list[RoundRecord], list[tuple[float, float]]]:
    """The rounds of a method, and with ``replay`` what their forwards take alone, (target, draft).

    They are run twice, and the second time counts: by then every shape of batch has been seen, every kernel compiled,
    every graph captured. Scripted verdicts are the same both times.
    """
    wrap = scripted(load.acceptance, models.vocab_size)
    with LLM.from_models(models, replace(config, method=method), wrap_verifier=wrap) as llm:
        prompts = load.prompts(models.vocab_size)
        for kv in filter(None, (llm.engine.scheduler.target_kv, llm.engine.scheduler.draft_kv)):
            cache_prompts(kv, prompts, load.context)
        steps = load.rounds * (2 if method == "speculative" else 1)
        for _ in range(2):
            records = _rounds(llm, prompts, load, steps, stopped)
        return records, [seconds_alone(llm, record) for record in records] if replay else []


def cache_prompts(kv: KVCacheManager, prompts: Sequence[Sequence[int]], length: int) -> None:
    """Make the first ``length`` tokens of each prompt, whole pages, findable as if they had been computed.

    Every prompt must fit beside the others, or the later ones drive out the earlier.
    """
    for number, prompt in enumerate(prompts):
        sequence = -1 - number  # an id that no request has
        cached = kv.begin(sequence, prompt)
        kv.reserve(sequence, length, min(cached, length))
        kv.commit(sequence, prompt, length)
        kv.free(sequence)


def _rounds(
    llm: LLM, prompts: Sequence[list[int]], load: Load, steps: int, stopped: Callable[[], bool]
) -> list[RoundRecord]:
    """The first ``steps`` rounds of all prompts at once, none of which ends."""
    records: list[RoundRecord] = []

    def look(delta: OutputDelta) -> None:
        if delta.error is not None:
            raise RoundFailed(delta.error)
        if stopped():
            raise Interrupted
        if len(records) >= steps:
            raise _Enough  # what ``generate`` does then is abort the requests

    params = [
        SamplingParams(max_tokens=load.max_tokens, ignore_eos=True, seed=number) for number in range(len(prompts))
    ]
    llm.engine.observer = records.append
    with suppress(_Enough):
        llm.generate(prompts, params, look)
    records = records[:steps]
    if any(len(work.tokens) != work.num_logits for record in records for work in record.plan.target.work):
        raise RoundError("prompts were not found in the prefix cache: these rounds computed some of them")
    return records


def expected_tokens(method: MethodName, acceptance: float, window: int) -> float:
    """Tokens that a request gets in a round, on average (``pearl_tokens_per_second`` explains PEARL's)."""
    if method == "autoregressive":
        return 1.0
    a, held = acceptance, sum(acceptance**i for i in range(window))
    return held + a**window if method == "speculative" else held / (1 - a**window + a)


def _tokens(records: Sequence[RoundRecord]) -> int:
    return sum(len(decision.committed) for record in records for decision in record.result.decisions.values())


def _acceptance(records: Sequence[RoundRecord]) -> float:
    decisions = [decision for record in records for decision in record.result.decisions.values()]
    tested = sum(min(d.accepted + 1, len(d.tested)) for d in decisions)
    return sum(d.accepted for d in decisions) / tested if tested else 0.0


def _median_ms(seconds: Iterable[float]) -> float:
    return statistics.median(seconds) * 1e3


def _median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))

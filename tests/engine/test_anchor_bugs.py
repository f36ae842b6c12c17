"""Bugs of other implementations (shared/ANCHORS.md), each with the test that would have found it.

Here are those that show without a model: 1, 3, 4, 5, 7, 9, 10, 11, 12, 13. Ids beyond 256 in bf16 models (2), the
first token after prefill (6) and unverified pages in the prefix cache (8) are in tests/e2e and tests/kv.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_requests import request_of
from engine_sim import simulate
from engine_toy import COLUMNS, VOCAB, Toy
from method_paces import METHODS
from pace_support import SIZES, measured_round
from simulated_models import target_sequence
from torch import Tensor

import pearl
import pearl_kernels
from pearl.drafting.logits_ring import LogitsRing
from pearl.engine.branches import is_hit
from pearl.pace import AutoPace, BalancedPace, Load
from pearl.sampling_batch import _signed
from pearl.workers import ThreadWorker
from pearl.workers.model_runner import build_batch
from pearl_kernels.reference import sampling as reference_sampling
from pearl_kernels.reference import verification as reference_verification
from pearl_kernels.reference.philox import Stream, to_uniform

DRAFTING = [name for name in METHODS if name not in ("autoregressive", "switching")]
PREPARING = ("pearl", "whole-windows", "pre-verify-only")  # where both models work in one round


# 1: the same random number used for two tests ---------------------------------------------------------------------


class RandomLog:
    """Records the (seed, position, stream) of every draw that the verdict looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: Counter[tuple[int, int, Stream]] = Counter()
        for module, name in (
            (reference_sampling, "gumbel"),
            (reference_verification, "gumbel"),
            (reference_verification, "uniform"),
        ):
            monkeypatch.setattr(module, name, self._recording(getattr(module, name)))

    def _recording(self, original: Any) -> Any:
        def draw(seed: Tensor, position: Tensor, stream: Stream, *rest: Any) -> Tensor:
            for s, p in zip(seed.tolist(), position.tolist(), strict=True):
                self.drawn[s, p, Stream(stream)] += 1
            return original(seed, position, stream, *rest)

        return draw


@pytest.mark.parametrize("method", DRAFTING)
def test_1_no_random_number_is_examined_twice(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RandomLog(monkeypatch)
    toy = Toy(method, "rejection", blur=1.0)
    toy.generate([1, 2, 3], [4, 5], temperature=1.0, max_tokens=24)
    verdicts = {key: count for key, count in log.drawn.items() if key[2] is not Stream.DRAFT}
    assert max(verdicts.values()) == 1
    # Each output position has one acceptance test, or one bonus draw; a replacement only after a failed test.
    for seed, length in ((7, 3), (8, 2)):
        decided = [p for s, p, stream in verdicts if s == seed and stream in (Stream.ACCEPT, Stream.SAMPLE)]
        assert sorted(decided) == list(range(length, length + 24))
        for s, position, stream in verdicts:
            assert stream is not Stream.RESIDUAL or (s, position, Stream.ACCEPT) in verdicts
    assert {stream for _, _, stream in verdicts} >= {Stream.ACCEPT, Stream.RESIDUAL}


@pytest.mark.parametrize("branch_seed", [None, 0])
@pytest.mark.parametrize("method", PREPARING)
def test_1_in_blocks_a_prepared_window_has_the_keys_of_the_rejection_before_it(
    method: str, branch_seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that is pending was drawn with the very keys that it would have been drawn with a round later; and no
    verdict looks at noise that an earlier one has looked at.
    """
    log = RandomLog(monkeypatch)
    toy = Toy(method, "block", blur=1.0, branches=12, branch_seed=branch_seed)
    toy.generate([1, 2, 3], [4, 5], temperature=1.0, max_tokens=40)
    assert all(count == 1 for (_, _, stream), count in log.drawn.items() if stream is not Stream.DRAFT)
    checked = 0
    for record, after in itertools.pairwise(toy.records):
        states = {work.state.request_id: work.state for work in after.plan.target.work}
        for item in record.plan.draft.work:
            now = item.forward.state
            for branch in item.branches:
                window = record.result.prepared[branch.id]
                if is_hit(branch, window, record.result.decisions[now.request_id]) and now.request_id in states:
                    assert branch.seed == states[now.request_id].seed != now.seed
                    drawn = range(branch.start + 1, branch.start + len(window))
                    assert branch.seed is not None
                    assert all(log.drawn[_signed(branch.seed), position, Stream.DRAFT] for position in drawn)
                    checked += 1
    assert checked


@pytest.mark.parametrize("method", DRAFTING)
def test_1_no_random_number_is_examined_twice_in_blocks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor drawn from twice: a block's verdict has looked at all that was drafted, and at noise beyond what holds."""
    log = RandomLog(monkeypatch)
    toy = Toy(method, "block", blur=1.0)
    toy.generate([1, 2, 3], [4, 5], temperature=1.0, max_tokens=24)
    assert max(log.drawn.values()) == 1
    assert {stream for _, _, stream in log.drawn} >= {Stream.ACCEPT, Stream.RESIDUAL, Stream.DRAFT}
    decisions = [d for record in toy.records for d in record.result.decisions.values()]
    seeds = {seed for seed, _, stream in log.drawn if stream is Stream.DRAFT}
    assert len(seeds) > sum(d.rejected for d in decisions) / 2 > 5  # the last may have come after all that is drafted
    assert any(d.accepted < len(d.tested) - 1 for d in decisions)


@pytest.mark.parametrize("method", DRAFTING)
def test_1_the_draft_never_draws_from_the_targets_numbers_under_rejection(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = Toy(method, "rejection")
    log = RandomLog(monkeypatch)
    monkeypatch.setattr(toy.engine._verifier, "verify", lambda *args: pytest.fail("not reached"))
    toy.engine.add(request_of(1, [1, 2, 3], 8, params=pearl.SamplingParams(temperature=1.0)))
    assert toy.engine.workers.drafter is not None
    toy.engine.workers.drafter.propose(toy.scheduler.schedule().draft)
    assert [(p, stream) for _, p, stream in log.drawn] == [(p, Stream.DRAFT) for p in (3, 4, 5)]


# 3, 4, 5: what is verified, and what is returned --------------------------------------------------------------------


def test_3_without_pre_verify_the_first_token_of_a_fresh_window_is_verified_too() -> None:
    simulation = simulate("whole-windows", window=3, accuracy=0.0)
    simulation.add(request_of(1, [1, 2, 3], 6, eos_ids=()))
    assert simulation.run()[1] == target_sequence([1, 2, 3], 6, eos_ids=())
    tested = [d.tested for record in simulation.records for d in record.result.decisions.values()]
    assert all(len(tokens) > 1 for tokens in tested[:-1])
    assert simulation.last[1].metrics.accepted == 0  # each fresh window fell at its very first token


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_4_output_ends_at_eos_as_drafted_and_as_corrected_token(method: str, accuracy: float) -> None:
    simulation = simulate(method, window=4, accuracy=accuracy)
    prompts = [p for p in ([i, j] for i in range(1, 12) for j in (3, 7)) if 0 in target_sequence(p, 20)][:6]
    assert len(prompts) >= 4
    simulation.add(*(request_of(i, p, 20) for i, p in enumerate(prompts)))
    outputs = simulation.run()
    for i, prompt in enumerate(prompts):
        metrics = simulation.last[i].metrics
        assert outputs[i] == target_sequence(prompt, 20)
        assert outputs[i].index(0) == len(outputs[i]) - 1
        assert (simulation.last[i].finish_reason, metrics.output_tokens) == ("stop", len(outputs[i]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_5_exactly_max_tokens_and_never_a_token_that_is_still_unverified(method: str, max_tokens: int) -> None:
    simulation = simulate(method, window=5, accuracy=0.8)
    simulation.add(*(request_of(i, [i, 2], max_tokens, eos_ids=()) for i in range(1, 4)))
    while simulation.engine.has_work:
        simulation.step()
        for i in range(1, 4):
            wanted = target_sequence([i, 2], max_tokens, eos_ids=())
            assert simulation.outputs[i] == wanted[: len(simulation.outputs[i])]
    assert all(len(output) == max_tokens for output in simulation.outputs.values())


# 7: the window ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", DRAFTING)
@pytest.mark.parametrize("accuracy", [0.0, 0.5, 1.0])
def test_7_window_of_one(method: str, accuracy: float) -> None:
    simulation = simulate(method, window=1, accuracy=accuracy)
    simulation.add(*(request_of(i, [i], 9) for i in (1, 2)))
    assert simulation.run() == {i: target_sequence([i], 9) for i in (1, 2)}


def test_7_windows_are_never_empty_however_fast_the_target() -> None:
    for pace in (BalancedPace("pearl", 16, SIZES), AutoPace(["pearl"], 16, SIZES)):
        for _ in range(9):
            assert pace.decide([1], Load(1, 50), False).windows[0] >= 1
            pace.observe(measured_round(1, target_seconds=1e-9))
        assert pace.decide([1], Load(1, 50), False).windows == (1,)


def test_7_the_window_follows_the_batch_size() -> None:
    pace = BalancedPace("pearl", 16, SIZES)
    for batch, target in ((1, 3.0), (16, 9.0)) * 3:
        for window in (1, 12):
            pace.observe(measured_round(batch, rows=batch * window, target_seconds=target))
    assert [pace.decide(range(n), Load(n, 50 * n), False).windows[0] for n in (1, 16, 1)] == [3, 9, 3]


# 9: verification is one ragged sequence -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_9_a_verification_is_one_sequence_of_the_batch(method: str) -> None:
    """R is the number of requests, not of tokens: the KV of a request is read once for its whole window."""
    simulation = simulate(method, window=4, accuracy=1.0)
    simulation.add(*(request_of(i, [i, i, i], 20, eos_ids=()) for i in (1, 2, 3)))
    longest = 0
    while simulation.engine.has_work:
        work = simulation.step().target.work
        if not work:
            continue
        batch = build_batch(work, 4, torch.device("cpu"))
        assert batch.block_tables.shape[0] == batch.context_lens.shape[0] == len(work) <= 3
        assert batch.query_start.tolist()[-1] == len(batch.input_ids) == sum(len(w.tokens) for w in work)
        assert batch.context_lens.tolist() == [w.end for w in work]
        for w, end in zip(work, batch.query_start.tolist()[1:], strict=True):
            assert set(range(end - w.num_logits, end)) <= set(batch.logits_rows.tolist())
        assert len(batch.logits_rows) == sum(w.num_logits for w in work)
        longest = max(longest, *(w.num_logits for w in work))
    assert longest >= (1 if method == "autoregressive" else 4)


# 10, 11 ------------------------------------------------------------------------------------------------------------


def test_10_no_uniform_is_zero_or_one() -> None:
    lowest, highest = to_uniform(torch.tensor([0, 2**32 - 1])).tolist()
    assert 0.0 < lowest < 1e-9
    assert 1.0 - 1e-6 < highest < 1.0


@pytest.mark.parametrize("method", METHODS)
def test_11_mixed_temperatures_and_prompts_shorter_than_the_window(method: str) -> None:
    toy = Toy(method, "rejection", window=5)
    for i, temperature in enumerate((0.0, 1.0, 0.3, 2.0)):
        params = pearl.SamplingParams(temperature=temperature)
        toy.engine.add(request_of(i, list(range(1, i + 2)), 6, params=params, eos_ids=(), seed=i))
    counts: Counter[int] = Counter()
    while toy.engine.has_work:
        for delta in toy.engine.step():
            assert delta.error is None
            counts[delta.request_id] += len(delta.token_ids)
    assert counts == dict.fromkeys(range(4), 6)


# 12: two engines in one process --------------------------------------------------------------------------------


def test_12_two_engines_of_one_process_do_not_touch_each_other() -> None:
    def worker() -> ThreadWorker:
        return ThreadWorker("toy", 1)

    engines = [Toy("pearl", window=3, worker=worker), Toy("speculative", window=2, worker=worker)]  # type: ignore[arg-type]
    settings = pearl.SamplingParams(temperature=1.0)
    outputs: list[list[int]] = [[], []]
    for toy in engines:
        toy.engine.add(request_of(1, [1, 2, 3], 8, params=settings, eos_ids=(), seed=7))
    while any(toy.engine.has_work for toy in engines):
        for toy, output in zip(engines, outputs, strict=True):
            for delta in toy.engine.step():
                output += delta.token_ids
    for toy in engines:
        toy.engine.close()
    for method, window, output in (("pearl", 3, outputs[0]), ("speculative", 2, outputs[1])):
        assert Toy(method, window=window).generate([1, 2, 3], max_tokens=8, temperature=1.0) == [output]


def sources(package: Any) -> list[Path]:
    return sorted(Path(package.__file__).parent.rglob("*.py"))


def test_12_no_fixed_shared_memory_or_rendezvous_names_and_no_mutable_module_state() -> None:
    for path in (*sources(pearl), *sources(pearl_kernels)):
        text = path.read_text()
        assert not re.search(r"SharedMemory|\bshared_memory\b|MASTER_PORT|tcp://|init_process_group", text), path
        assert not re.search(r"^\s*global ", text, re.MULTILINE), path
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.List | ast.Dict | ast.Set | ast.Call):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "partial":
                    continue  # a function
                variables = [n for n in names if n != "__all__" and n.upper() != n and not n[0].isupper()]
                assert not variables, f"{path}:{node.lineno}: module state: {variables}"


# 13: no probabilities kept for every token ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "params"),
    [
        ("rejection", {}),
        ("coupled", {}),
        ("coupled", {"temperature": 1.0}),
        ("rejection", {"temperature": 1.0, "draft_temperature": 0.0}),
    ],
)
def test_13_greedy_and_coupled_requests_keep_no_draft_logits(rule: Any, params: dict[str, float]) -> None:
    toy = Toy("pearl", rule)
    toy.generate([1, 2, 3], [4, 5], **params)
    assert toy.ring.logits is None
    assert all(record.proposal.logits is None for record in toy.records)


def test_13_draft_logits_are_bounded_by_lanes_and_window() -> None:
    toy = Toy("whole-windows", "rejection", lanes=2, window=3)
    toy.generate(*([i] for i in range(5)), temperature=1.0)
    assert toy.ring.logits is not None
    assert toy.ring.logits.shape == (2 * 2 * 3 + 1, COLUMNS)  # and one row that is nobody's


def test_13_a_pending_tokens_logits_are_not_overwritten_by_the_next_window() -> None:
    ring = LogitsRing(lanes=2, window=3)
    rows = {(lane, p): ring.row(lane, p) for lane in (0, 1) for p in range(5, 11)}
    for (lane, position), row in rows.items():
        ring.store([row], torch.full((1, VOCAB), 100.0 * lane + position))
    assert ring.logits is not None
    for (lane, position), row in rows.items():
        assert ring.logits[row, 0] == 100.0 * lane + position

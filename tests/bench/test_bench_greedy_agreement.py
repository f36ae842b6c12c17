"""``bench/greedy_agreement.py``: a tie is told from a real difference."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_support import ROOT

from bench import greedy_agreement
from bench.greedy_agreement import TIES, Run, compare, describe, first_difference, generate
from pearl.bench.prompt_sets import load_prompts
from pearl.errors import ConfigurationError, PearlError
from pearl.messages import TokenLogprobs
from pearl.outputs import CompletionOutput

PROMPTS = load_prompts("builtin", 2)


def output(tokens: Sequence[int], *rows: Sequence[tuple[int, float]]) -> CompletionOutput:
    """``rows``: of each token, the most likely tokens with their log-probabilities; the token itself is among them."""
    logprobs = [TokenLogprobs(dict(row)[token], tuple(row)) for token, row in zip(tokens, rows, strict=True)]
    return CompletionOutput(0, token_ids=list(tokens), logprobs=logprobs)


SURE = ((1, -0.1), (2, -3.0))
EXPECTED = output((1, 7, 1), SURE, ((7, -0.5), (8, -0.5009), (9, -2.0)), SURE)


@pytest.fixture(scope="module")
def real() -> list[Run]:
    return generate("cpu", "float32", ("autoregressive", "pearl"), PROMPTS, 12)


def test_a_tie_needs_both_runs_to_hold_the_two_tokens_for_equal() -> None:
    def against(*row: tuple[int, float]) -> greedy_agreement.Difference | None:
        token = row[0][0]
        return first_difference(4, EXPECTED, output((1, token, 2), SURE, row, SURE), 1e-3)

    tie = against((8, -0.5), (7, -0.5002))
    assert tie is not None
    assert (tie.prompt, tie.position, tie.expected_token, tie.token, tie.tie) == (4, 1, 7, 8, True)
    assert tie.expected_gap == pytest.approx(0.0009)
    assert tie.gap == pytest.approx(0.0002)
    sure_of_another = against((8, -0.1), (7, -3.0))
    assert sure_of_another is not None
    assert not sure_of_another.tie, "rounding does not make a run sure"
    far_in_the_expected = against((9, -0.5), (7, -0.5001))
    assert far_in_the_expected is not None
    assert (far_in_the_expected.tie, far_in_the_expected.expected_gap) == (False, 1.5)
    unlikely = against((5, -0.5), (7, -0.5001))
    assert unlikely is not None
    assert (unlikely.tie, unlikely.expected_gap) == (False, None)
    assert against((7, -0.4), (8, -0.9)) is not None, "the third token differs"


def test_equal_outputs_have_no_difference_and_a_shorter_one_is_no_tie() -> None:
    assert first_difference(0, EXPECTED, replace(EXPECTED), 1e-3) is None
    shorter = first_difference(0, EXPECTED, output((1, 7), SURE, (*SURE, (7, -0.1))), 1e-3)
    assert shorter is not None
    assert (shorter.position, shorter.expected_token, shorter.token, shorter.tie) == (2, 1, None, False)


def test_the_threshold_is_that_of_the_coarser_dtype() -> None:
    other = output((1, 9, 2), SURE, ((9, -0.5), (7, -0.55)), SURE)
    near = output((1, 7, 1), SURE, ((7, -0.5), (9, -0.6)), ((1, -0.15), (2, -3.0)))
    fine, coarse = Run("fine", "float32", [near]), Run("coarse", "bfloat16", [other])
    assert compare(fine, coarse).threshold == compare(coarse, fine).threshold == TIES["bfloat16"] > TIES["float32"]
    assert compare(fine, coarse).agrees
    assert not compare(fine, replace(coarse, dtype="float32")).agrees
    text = "\n".join(describe(compare(fine, replace(coarse, dtype="float32"))))
    assert "0 of 1 equal" in text
    assert "prompt 0, token 1: 7 or 9, gaps 0.1, 0.05: NO TIE" in text


def test_drift_is_of_the_shared_tokens_only() -> None:
    drifted = output((1, 8, 1), ((1, -0.13), (2, -3.0)), ((8, -0.1), (7, -5.0)), SURE)
    assert compare(Run("a", "float32", [EXPECTED]), Run("b", "float32", [drifted])).drift == pytest.approx(0.03)


def test_an_output_that_the_engine_gave_up_is_an_error() -> None:
    failed = Run("cuda float32 pearl", "float32", [replace(EXPECTED, error="CUDA error")])
    with pytest.raises(PearlError, match="cuda float32 pearl: prompt 0 was given up: CUDA error"):
        compare(Run("a", "float32", [EXPECTED]), failed)


def test_real_outputs_of_two_methods_agree(real: list[Run]) -> None:
    plain, pearl = real
    assert (plain.name, pearl.name) == ("cpu float32 autoregressive", "cpu float32 pearl")
    comparison = compare(plain, pearl)
    assert comparison.agrees
    assert comparison.tokens == 2 * 12
    assert comparison.drift < TIES["float32"]


@pytest.mark.parametrize(("gap", "agrees"), [(5e-4, True), (0.5, False)], ids=["tie", "difference"])
def test_a_change_of_one_token_in_real_outputs_is_found(real: list[Run], gap: float, agrees: bool) -> None:
    """The second most likely token is taken at one position, as a rounding or a bug would."""
    position, outputs = 5, list(real[1].outputs)
    original = outputs[1]
    assert original.logprobs is not None
    (best, logprob), (second, _), *rest = original.logprobs[position].top
    row = TokenLogprobs(logprob, ((second, logprob), (best, logprob - gap), *rest))
    theirs = TokenLogprobs(logprob, ((best, logprob), (second, logprob - gap), *rest))
    changed = [*original.token_ids[:position], second, *original.token_ids[position + 1 :]]
    logprobs = [*original.logprobs[:position], row, *original.logprobs[position + 1 :]]
    outputs[1] = replace(original, token_ids=changed, logprobs=logprobs)
    reference = list(real[0].outputs)
    expected = reference[1].logprobs
    assert expected is not None
    reference[1] = replace(reference[1], logprobs=[*expected[:position], theirs, *expected[position + 1 :]])
    comparison = compare(replace(real[0], outputs=reference), replace(real[1], outputs=outputs))
    (difference,) = comparison.differences
    assert (difference.prompt, difference.position) == (1, position)
    assert (difference.expected_token, difference.token) == (best, second)
    assert difference.gap == pytest.approx(gap)
    assert comparison.agrees is agrees


def test_a_real_difference_is_no_tie(real: list[Run]) -> None:
    """Another text's continuation: the runs part where each is sure of its own."""
    (other,) = generate("cpu", "float32", ("autoregressive",), [PROMPTS[1], PROMPTS[0]], 12)
    comparison = compare(real[0], other)
    assert len(comparison.differences) == 2
    assert not comparison.agrees


def test_the_command_compares_dtypes_and_methods_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "greedy.json"
    line = [sys.executable, "bench/greedy_agreement.py", "--device", "cpu", "--prompts", "1"]
    done = subprocess.run(
        [*line, "--max-tokens", "6", "--json", str(file)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(file.read_text())
    assert (content["complete"], content["agrees"], content["ties"]) == (True, True, TIES)
    pairs = [(c["expected"].split()[1:], c["run"].split()[1:]) for c in content["comparisons"]]
    assert pairs == [
        (["float32", "autoregressive"], ["float32", "speculative"]),
        (["float32", "autoregressive"], ["float32", "pearl"]),
        (["float32", "autoregressive"], ["float32", "pearl@5+6"]),
        (["float32", "autoregressive"], ["bfloat16", "autoregressive"]),
        (["float32", "autoregressive"], ["bfloat16", "speculative"]),
        (["float32", "autoregressive"], ["bfloat16", "pearl"]),
        (["float32", "autoregressive"], ["bfloat16", "pearl@5+6"]),
        (["bfloat16", "autoregressive"], ["bfloat16", "speculative"]),
        (["bfloat16", "autoregressive"], ["bfloat16", "pearl"]),
        (["bfloat16", "autoregressive"], ["bfloat16", "pearl@5+6"]),
    ]
    assert all(math.isfinite(c["drift"]) for c in content["comparisons"])
    assert done.stdout.count(" against ") == len(pairs)


def test_a_difference_that_is_no_tie_is_exit_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = output((1, 9, 1), SURE, ((9, -0.1), (7, -4.0)), SURE)

    def made(device: str, dtype: str, methods: Sequence[str], *_: Any) -> list[Run]:
        outputs = {"pearl": [wrong]} if dtype == "bfloat16" else {}
        return [Run(f"{device} {dtype} {m}", dtype, outputs.get(m, [EXPECTED])) for m in methods]

    monkeypatch.setattr(greedy_agreement, "generate", made)
    file = tmp_path / "greedy.json"
    monkeypatch.setattr(sys, "argv", ["x", "--device", "cpu", "--json", str(file)])
    with pytest.raises(SystemExit) as leaving:
        greedy_agreement.main()
    assert leaving.value.code == 1
    assert "NO TIE" in capsys.readouterr().out
    assert json.loads(file.read_text())["agrees"] is False


def test_a_missing_folder_is_refused_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy_agreement, "generate", lambda *_: pytest.fail("something was generated"))
    with pytest.raises(ConfigurationError, match=r"--json: the folder .* does not exist"):
        greedy_agreement.greedy_agreement("cpu", 1, 1, tmp_path / "no" / "file.json")

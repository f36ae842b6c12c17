"""``bench/latency.py``: its numbers on tiny shapes, its files, and the input that it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_support import Finished, hand_made_round
from latency_support import LABEL, METHODS, TINY, cells_of, numbers

from bench.round_latency import program
from bench.round_latency.cell import Interrupted, Load, cache_prompts, expected_tokens, measure, summarise
from bench.round_latency.report import Latencies
from pearl.bench.shapes import SHAPES, forward_bytes, load_shapes, random_prompts
from pearl.config import EngineConfig
from pearl.errors import PearlError
from pearl.kv import KVCacheManager
from pearl.messages import Busy
from pearl.models import KVCache

CONFIG = EngineConfig(device="cpu", draft_threads=1, target_threads=1)
Script = Callable[..., Finished]
SCRIPT = "latency.py"


@pytest.fixture(autouse=True)
def a_known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring memory takes a second, and is tested elsewhere."""
    monkeypatch.setattr(program, "read_bandwidth", lambda size, device, threads: 20.0)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("read_bandwidth", "random_decoders"):
        monkeypatch.setattr(program, name, lambda *_: pytest.fail("something ran"))


def test_the_report_has_every_cell_and_number(script: Script, tmp_path: Path) -> None:
    out, markdown = tmp_path / "latency.json", tmp_path / "latency.md"
    finished = script(
        *TINY, "--batch", "1,3", "--context", "32,64", "--rounds", "4", "--window", "3", "--eager-too",
        "--json", str(out), "--markdown", str(markdown),
    )  # fmt: skip
    assert finished.code == 0, finished.err
    report = json.loads(out.read_text())
    assert {"settings", "machine", "versions", "commit", "read_bandwidth_gb_s", "cells"} <= report.keys()
    assert report["label"] == f"tiny-target:tiny-draft, random weights; {LABEL}"
    assert (report["read_bandwidth_gb_s"], report["interrupted"]) == (20.0, False)
    wanted = {"window": 3, "rounds": 4, "synthetic_acceptance": 0.8, "device": "cpu", "dtype": "bfloat16"}
    assert wanted.items() <= report["settings"].items()
    assert [(c["batch"], c["context"]) for c in report["cells"]] == [(1, 32), (1, 64), (3, 32), (3, 64)]
    for cell in report["cells"]:
        assert (cell["target"], cell["draft"], cell["skipped"]) == ("tiny-target", "tiny-draft", None)
        for found in (cell, cell["eager"]):
            check_numbers(found)
        check_limit(cell)
    for text in (finished.out, markdown.read_text()):
        assert LABEL in " ".join(text.split())
        assert "3 x 64" in text
    grid = [line for line in markdown.read_text().splitlines() if line.startswith("|")]
    assert len(grid) == 2 * (2 + 8)
    assert {line.count("|") for line in grid[:10]} == {grid[0].count("|")}


def check_numbers(found: dict[str, Any]) -> None:
    scalars = [field.name for field in fields(Latencies) if field.type == "float"]
    assert len(scalars) == 10
    assert all(found[name] > 0 for name in scalars)
    for name in ("tok_s", "tok_s_expected"):
        assert list(found[name]) == METHODS
        assert all(value > 0 for value in found[name].values())
    # A round contains both its forwards.
    assert found["pearl_round_ms"] >= max(found["pearl_target_ms"], found["pearl_draft_ms"])
    assert found["round_over_longer_together"] >= 1
    assert found["speculative_round_ms"] > found["draft_window_ms"]


def check_limit(cell: dict[str, Any]) -> None:
    shape = SHAPES["tiny-target"]
    kv = cell["batch"] * cell["context"] * KVCache.bytes_per_token(shape, torch.bfloat16)
    assert cell["decode_bytes"] == forward_bytes(shape, torch.bfloat16) + kv
    seconds = cell["decode_bytes"] / 20e9
    assert cell["share_of_read_limit"] == pytest.approx(seconds * 1e3 / cell["decode_ms"])


def test_without_being_asked_a_cpu_is_not_measured_eagerly(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs: list[EngineConfig] = []

    def found(models: object, config: EngineConfig, load: Load, stopped: object) -> Latencies:
        configs.append(config)
        return numbers()

    monkeypatch.setattr(program, "measure", found)
    out = tmp_path / "latency.json"
    for option, wanted in ((), [False]), (("--eager-too",), [False, True]):
        configs.clear()
        assert script(*TINY, "--batch", "2", "--context", "32", "--json", str(out), *option).code == 0
        assert [config.enforce_eager for config in configs] == wanted
        assert (cells_of(out)[0]["eager"] is not None) == (len(wanted) == 2)
    assert (configs[0].max_num_seqs, configs[0].prefix_caching, configs[0].window) == (2, True, 6)


def test_numbers_are_medians_and_ratios_of_rounds() -> None:
    """Three rounds of each method; every number differs, so that none can stand for another."""
    plain = [hand_made_round(i, whole=Busy(0, w), target=Busy(0, w - 1), own=True) for i, w in enumerate((2, 9, 4))]
    in_turns, pearl = [], []
    for number, (draft, target) in enumerate(((5.0, 7.0), (4.0, 8.0), (6.0, 30.0))):
        in_turns.append(hand_made_round(number, whole=Busy(0, draft + 0.5), draft=Busy(0, draft), drafted=3))
        verified = Busy(0, target + 0.25)
        in_turns.append(hand_made_round(number, whole=verified, target=Busy(0, target), accepted=3, own=True))
    for number, (draft, target) in enumerate(((10.0, 12.0), (11.0, 9.0), (20.0, 13.0))):
        together = {"draft": Busy(0, draft), "target": Busy(0, target), "drafted": 3}
        pearl.append(hand_made_round(number, whole=Busy(0, max(draft, target) * 1.5), accepted=1, own=True, **together))
    alone = [(9.0, 6.0), (5.0, 11.0), (10.0, 15.0)]
    load = Load(batch=1, context=16, window=3, rounds=3, acceptance=0.5)
    found = summarise(load, {"autoregressive": plain, "speculative": in_turns, "pearl": pearl}, alone)
    assert (found.decode_ms, found.verify_ms, found.draft_window_ms) == (3e3, 8e3, 5e3)
    assert (found.speculative_round_ms, found.pearl_round_ms) == (12.75e3, 18e3)
    assert (found.pearl_target_ms, found.pearl_draft_ms) == (12e3, 11e3)
    assert found.round_over_longer == 18 / 9  # of 18 / 9, 16.5 / 11 and 30 / 15
    assert found.round_over_longer_together == 1.5
    assert found.overlap == 15 / 18  # of 15 / 18, 16 / 16.5 and 25 / 30
    seconds = {"autoregressive": 15, "speculative": 15 + 45 + 3 * 0.75, "pearl": 18 + 16.5 + 30}
    assert found.tok_s == pytest.approx({m: n / seconds[m] for m, n in zip(METHODS, (3, 3 * 4, 3 * 2), strict=True)})
    expected = {m: 3 * expected_tokens(m, 0.5, 3) / seconds[m] for m in seconds}  # type: ignore[arg-type]
    assert found.tok_s_expected == pytest.approx(expected)
    assert found.acceptance_rate == {"speculative": 9 / 12, "pearl": 3 / 6}


def test_rounds_have_the_tokens_of_the_acceptance_rate() -> None:
    """Many scripted rounds commit what the formula expects; their verdicts are the same on every machine."""
    load = Load(batch=4, context=16, window=4, rounds=80, acceptance=0.7)
    config = load.config(CONFIG)
    found = measure(load_shapes(config, "tiny-target", "tiny-draft"), config, load, lambda: False)
    for method in METHODS:
        assert found.tok_s[method] == pytest.approx(found.tok_s_expected[method], rel=0.1)
    assert found.tok_s["autoregressive"] == pytest.approx(found.tok_s_expected["autoregressive"])
    assert all(rate == pytest.approx(0.7, abs=0.06) for rate in found.acceptance_rate.values())


@pytest.mark.parametrize(("acceptance", "window"), [(0.8, 6), (0.3, 1), (1.0, 5)])
def test_expected_tokens(acceptance: float, window: int) -> None:
    """Against the plain forms: with certain acceptance a window, and the bonus of those that take turns."""
    a, g = acceptance, window
    assert expected_tokens("autoregressive", a, g) == 1
    if a == 1:
        assert (expected_tokens("speculative", a, g), expected_tokens("pearl", a, g)) == (g + 1, g)
        return
    assert expected_tokens("speculative", a, g) == pytest.approx((1 - a ** (g + 1)) / (1 - a))
    assert expected_tokens("pearl", a, g) == pytest.approx((1 / a + 1 / (1 - a)) / (1 / a + 1 / (1 - a**g)))


def test_prompts_are_found_in_the_cache() -> None:
    prompts = random_prompts([65, 65, 65], 512)
    kv = KVCacheManager(num_pages=3 * 5, page_size=16)
    for _ in range(2):  # a second time they are there already
        cache_prompts(kv, prompts, 64)
        kv.check_integrity()
    assert [kv.begin(number, prompt) for number, prompt in enumerate(prompts)] == [64, 64, 64]
    assert len({page for number in range(3) for page in kv.block_table(number)}) == 3 * 4


def test_a_prompt_that_had_to_be_computed_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.round_latency.cell.cache_prompts", lambda *_: None)
    load = Load(batch=1, context=32, window=2, rounds=3, acceptance=0.8)
    config = load.config(CONFIG)
    with pytest.raises(PearlError, match="not found in the prefix cache"):
        measure(load_shapes(config, "tiny-target", "tiny-draft"), config, load, lambda: False)


def test_a_measurement_can_be_stopped_between_rounds() -> None:
    load = Load(batch=1, context=32, window=2, rounds=50, acceptance=0.8)
    config = load.config(CONFIG)
    asked: list[None] = []

    def stopped() -> bool:
        asked.append(None)
        return len(asked) > 10

    with pytest.raises(Interrupted):
        measure(load_shapes(config, "tiny-target", "tiny-draft"), config, load, stopped)
    assert len(asked) == 11


BAD = [
    (("--shapes", "8b:9b"), "TARGET:DRAFT"),
    (("--synthetic-acceptance", "0"), "--synthetic-acceptance must be above 0 and at most 1, not 0"),
    (("--synthetic-acceptance", "1.5"), "not 1.5"),
    (("--batch", "1,x"), "--batch takes integers >= 1, separated by commas, not '1,x'"),
    (("--batch", "0"), "--batch"),
    (("--batch", "2²"), "--batch"),
    (("--context", ""), "--context takes integers"),
    (("--context", "9" * 5000), "--context takes integers"),
    (("--context", "100"), "--context must be a multiple of a KV page's 16: 100"),
    (("--context", "131072"), "tiny-target:tiny-draft have 131072; lower one of them"),
    (("--device", "abacus"), "abacus"),
    (("--dtype", "int3"), "int3"),
    (("--json", "/no/such/folder/x.json"), "/no/such/folder"),
    (("--markdown", "/tmp"), "--markdown: /tmp is a folder"),
]


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_refused_in_one_line_before_any_work(
    script: Script, arguments: tuple[str, ...], message: str
) -> None:
    finished = script(*TINY, *arguments)
    assert finished.code != 0
    assert finished.out == ""
    assert re.fullmatch(r"error: .+\n", finished.err), finished.err
    assert message in finished.err

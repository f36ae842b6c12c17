"""The GPU suite's summary.json, summary.md and pictures, from outputs made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_support import ROOT

from bench.gpu_suite.latency import SYNTHETIC, round_bars
from bench.gpu_suite.markdown import number, table
from bench.gpu_suite.outcome import CUT_OFF, OK, SKIPPED, Outcome
from bench.gpu_suite.report import Summary, write
from bench.gpu_suite.results import best_kernels, numbers
from bench.gpu_suite.stages import Place

LABEL = "8b:1b, random weights; synthetic acceptance 0.80: real forwards, scripted verdicts"
TESTS = """<testsuites><testsuite>
<testcase classname="ops.test_layers" name="a"/><testcase classname="ops.test_layers" name="b"/>
<testcase classname="ops.test_verify" name="c[cuda]"><failure message="m">%sassert 1 == 2</failure></testcase>
<testcase classname="ops.test_sample" name="d"><skipped/></testcase>
<testcase classname="ops.test_copy" name="e"><error message="CUDA error: out of memory"/></testcase>
</testsuite></testsuites>"""


def kernel(op: str, shape: str, contender: str, share: float, role: str = "provider") -> dict[str, Any]:
    return {
        "op": op, "shape": shape, "contender": contender, "role": role, "dtype": "torch.bfloat16", "device": "GPU X",
        "seconds": 1e-4 / share, "gb_s": 3000 * share, "limit_gb_s": 3000.0, "share_of_limit": share,
    }  # fmt: skip


KERNELS = [
    kernel("verify_attention", "8x9 rows, 8192 keys", "cuda", 0.85),
    kernel("verify_attention", "8x9 rows, 8192 keys", "triton", 0.6),
    kernel("verify_attention", "8x9 rows, 8192 keys", "F.scaled_dot", 0.425, "rival"),
    kernel("verify_attention", "8x9 rows, 1024 keys", "triton", 0.5),
    kernel("sample", "9x128256 top-p", "cuda", 0.5),
    kernel("sample", "9x128256 top-p", "reference", 0.9),
    kernel("sample", "9x32000 top-p", "cuda", 0.5),
    kernel("verify", "8x9x151936 coupled", "triton", 0.8),
    kernel("rms_norm", "8x4096", "reference", 0.5),
]


def latencies(decode: float) -> dict[str, Any]:
    by_method = {"autoregressive": 100.0, "speculative": 200.0, "pearl": 300.0}
    return {
        "decode_ms": decode, "verify_ms": 6.0, "draft_window_ms": 5.0, "speculative_round_ms": 11.5,
        "pearl_round_ms": 6.6, "pearl_target_ms": 6.4, "pearl_draft_ms": 6.1, "round_over_longer": 1.09,
        "round_over_longer_together": 1.03, "overlap": 1.66, "tok_s": by_method, "tok_s_expected": by_method,
        "acceptance_rate": {"speculative": 0.8, "pearl": 0.8},
    }  # fmt: skip


def latency(*cells: dict[str, Any]) -> dict[str, Any]:
    return {
        "label": LABEL, "read_bandwidth_gb_s": 3000.0, "cells": list(cells),
        "settings": {"shapes": "8b:1b", "batch": [1, 8], "context": [1024, 8192], "synthetic_acceptance": 0.8,
                     "window": 6, "rounds": 20, "device": "cuda", "dtype": "bfloat16"},
    }  # fmt: skip


def cell(batch: int, context: int, **more: Any) -> dict[str, Any]:
    return {"target": "8b", "draft": "1b", "batch": batch, "context": context, "skipped": None, "eager": None, **more}


LATENCY = latency(
    cell(1, 1024, **latencies(5.5), share_of_read_limit=0.9, eager={**latencies(9.5), "round_over_longer": 1.7}),
    cell(1, 8192, skipped="keys and values | do not fit"),
)
GREEDY = {
    "settings": {"device": "cuda"}, "ties": {"float32": 1e-3}, "complete": False, "agrees": False, "machine": {},
    "comparisons": [
        {"expected": "cpu float32 autoregressive", "run": "cuda float32 pearl", "prompts": 8, "drift": 0.00012,
         "differences": [
             {"prompt": 3, "position": 17, "expected_token": 11, "token": 12, "expected_gap": 1.25, "gap": None,
              "tie": False},
         ]},
    ],
}  # fmt: skip
ENVIRONMENT = {
    "gpus": [{"name": "GPU X", "driver_version": "580.1"}], "torch": {"cuda_available": True}, "nvcc": "13.0",
    "python": "3.12", "system": "Linux", "commit": "abc", "packages": {"torch": "2.11", "hypothesis": None},
}  # fmt: skip
PROVIDERS = {
    "providers": {"cuda": {"verify": [{"provider": "cuda", "chosen": False}, {"provider": "triton", "chosen": True}]}}
}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(ROOT, tmp_path, tmp_path / "work")
    place.results.mkdir(parents=True)
    place.file("environment.json").write_text(json.dumps(ENVIRONMENT))
    place.file("providers.json").write_text(json.dumps(PROVIDERS))
    place.file("tests.xml").write_text(TESTS % ("x" * 5000))
    benchmarks = [{"extra_info": row} for row in KERNELS]
    place.file("kernels-aims.json").write_text(json.dumps({"benchmarks": [*benchmarks, {"extra_info": {}}]}))
    place.file("kernels-others.json").write_text('{"benchmarks": [{"extra')  # cut off while it was written
    place.file("latency-8b-1b.json").write_text(json.dumps(LATENCY))
    place.file("greedy.json").write_text(json.dumps(GREEDY))
    return place


@pytest.fixture
def summary(place: Place) -> Summary:
    names = ("environment", "tests", "kernels", "latency", "agreement", "more")
    summary = Summary(place, names, "abc")
    summary.add(Outcome("environment", OK, 3.0), 3.0)
    summary.add(Outcome("tests", "failed", 100.0, "pytest ended with status 1"), 103.0)
    for name in ("kernels", "latency"):
        summary.add(Outcome(name, CUT_OFF, 100.0, "by its limit | of 100 s"), 200.0)
    summary.add(Outcome("agreement", SKIPPED, 0.0, "2 s of the budget are left, it needs 15"), 401.5)
    return summary


def test_the_json_has_every_stage_with_its_numbers(summary: Summary) -> None:
    write(summary)
    content = json.loads((summary.place.out / "summary.json").read_text())
    assert (content["ok"], content["seconds"], content["commit"], content["dry_run"]) == (False, 401.5, "abc", False)
    assert content["not_reached"] == ["more"]
    stages = {stage["name"]: stage for stage in content["stages"]}
    assert stages["environment"]["numbers"]["providers"] == {"cuda": {"verify": "triton"}}
    found = stages["tests"]["numbers"]
    assert (found["passed"], found["failed"], found["skipped"]) == (2, 2, 1)
    first, second = found["first_failures"]
    assert first["test"] == "ops.test_verify::c[cuda]"
    assert first["text"].endswith("assert 1 == 2")
    assert len(first["text"]) == 1500
    assert second["text"] == "CUDA error: out of memory"
    assert stages["latency"]["numbers"]["files"]["latency-8b-1b"] == LATENCY
    assert stages["agreement"]["numbers"] == {}, "a skipped stage has no results, whatever files lie there"
    assert not list(summary.place.out.glob("*.partial"))


def test_the_fastest_kernel_of_a_shape_is_held_against_its_aim() -> None:
    found = {(k.op, k.shape): k for k in best_kernels(KERNELS)}
    assert len(found) == 5, "no line for what only the reference computed"
    best = found["verify_attention", "8x9 rows, 8192 keys"]
    assert (best.provider, best.share, best.aim, best.reached) == ("cuda", 0.85, 0.8, True)
    assert best.over_rival == pytest.approx(2)
    assert best.providers == {"cuda": 0.85, "triton": 0.6}
    assert found["verify_attention", "8x9 rows, 1024 keys"].aim is None
    assert found["sample", "9x128256 top-p"].reached is False
    assert found["sample", "9x32000 top-p"].aim is None
    assert found["verify", "8x9x151936 coupled"].reached is True


def test_the_markdown_says_what_was_reached_and_what_is_synthetic(summary: Summary) -> None:
    write(summary)
    text = (summary.place.out / "summary.md").read_text()
    assert "DRY RUN" not in text
    assert "| agreement | skipped | 0 |  | 2 s of the budget are left, it needs 15 |" in text
    assert "| latency | cut off | 100 |  | by its limit \\| of 100 s |" in text
    assert "| more | not reached |" in text
    assert "Not installed: hypothesis." in text
    assert "Chosen on cuda: verify: triton." in text
    assert "2 passed, 2 failed, 1 skipped." in text
    assert "2 of 3 shapes reach it" in text
    assert "| cuda | 118 | 2,550 | 85.0% | reached | 2.00x | cuda 85.0%, triton 60.0% |" in text
    assert "| cuda | 200 | 1,500 | 50.0% | MISSED |" in text
    assert f"**{LABEL}**" in text
    assert "| 1 | 1024 | graphs | 5.5 | 6 | 5 | 11.5 | 6.6 | 1.09 | reached | 1.66 | 90.0% | reached |" in text
    assert "| 1 | 1024 | eager | 9.5 | 6 | 5 | 11.5 | 6.6 | 1.70 |  | 1.66 | - |  |" in text
    assert "at a synthetic acceptance of 0.8" in text
    assert "Batch 1, context 8192 skipped: keys and values | do not fit" in text
    assert "Cut off: 2 of 4 cells were reached." in text
    assert "Greedy" not in text


def test_differences_that_are_no_ties_stand_out(place: Place) -> None:
    summary = Summary(place, ("agreement",), None)
    summary.add(Outcome("agreement", "failed", 9.0), 9.0)
    write(summary)
    text = (place.out / "summary.md").read_text()
    assert "SOME DIFFERENCES ARE NO TIES" in text
    assert "Not all was compared." in text
    assert "| cuda float32 pearl | cpu float32 autoregressive | 7 of 8 | 0 | 1 | 0.00012 |" in text
    assert "| cuda float32 pearl | 3 | 17 | 11 | 12 | 1.25 | - | NO TIE |" in text


@pytest.mark.parametrize("wrong", [{"cells": [{}]}, {"cells": [{"decode_ms": 1.0}]}, ["x"]])
def test_a_file_that_is_not_as_expected_costs_its_own_section_only(summary: Summary, wrong: Any) -> None:
    summary.place.file("latency-8b-1b.json").write_text(json.dumps(wrong))
    write(summary)
    text = (summary.place.out / "summary.md").read_text()
    assert "Not as expected" in text.partition("## Latency")[2]
    assert "2 passed, 2 failed" in text


def test_a_dry_run_says_so(place: Place) -> None:
    dry = replace(place, dry=True)
    summary = Summary(dry, ("tests",), None)
    summary.add(Outcome("tests", OK, 1.0), 1.0)
    assert summary.numbers == {"tests": {}}, "results of real runs are not a dry run's"
    write(summary)
    assert (place.out / "summary.md").read_text().count("DRY RUN") == 2
    assert summary.ok


def test_pictures_are_drawn_of_what_there_is(summary: Summary) -> None:
    bars = round_bars(numbers("latency", summary.place))
    assert [(bar.name, bar.verify, bar.pearl, bar.over_longer) for bar in bars] == [
        ("8b:1b, batch 1, context 1024", 6.0, 6.6, 1.09)
    ]
    assert "synthetic" in SYNTHETIC
    out = summary.place.out
    write(summary)
    command = [sys.executable, "-m", "bench.gpu_suite.pictures", str(out), "round.png", "kernels.png"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    for picture in ("round.png", "kernels.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    write(summary)
    assert "![round.png](round.png)" in (out / "summary.md").read_text()


def test_tables_and_numbers() -> None:
    assert table(("a", "b"), [("x|y", 1), ("line\nbreak", None)], left=(0,)).splitlines() == [
        "| a | b |",
        "| --- | ---: |",
        "| x\\|y | 1 |",
        "| line break | None |",
    ]
    assert [number(x) for x in (1234.5, 99.96, 0.01234, None)] == ["1,234", "100", "0.0123", "-"]

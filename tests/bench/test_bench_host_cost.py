"""``bench/host_cost.py``: rounds with instant models, their parts, the file, and what is refused."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_support import Finished

from bench.round_cost import measure as measuring
from bench.round_cost import program
from bench.round_cost.instant import Text
from bench.round_cost.measure import Load, measure
from bench.round_cost.stopwatch import MODELS, Stopwatch
from pearl.config import EngineConfig
from pearl.engine.engine import Engine
from pearl.engine.model_loading import LoadedModels, load_models
from pearl.engine.rounds import RoundRecord

SCRIPT = "host_cost.py"
Script = Callable[..., Finished]
CONFIG = EngineConfig(device="cpu", draft_threads=1, target_threads=1, max_num_seqs=1)
PARTS = {"schedule", "draft", "pack", "verify", "commit", "outputs", "rest"}


@pytest.fixture(scope="module")
def models() -> LoadedModels:
    return load_models(CONFIG)


def test_the_report_has_every_kind(script: Script, tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    finished = script("--batch", "1,3", "--context", "20,50", "--rounds", "3", "--json", str(out))
    assert finished.code == 0, finished.err
    report = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "results"} <= report.keys()
    kinds = {(r["method"], r["batch"], r["context"], r["sampling"]) for r in report["results"]}
    assert len(kinds) == len(report["results"]) == 3 * 2 * 2 * 2
    for result in report["results"]:
        assert result["us_per_request"] == pytest.approx(result["us_per_round"] / result["batch"])
        assert PARTS - {"draft"} <= result["parts"].keys() <= PARTS
        assert all(us >= 0 for us in result["parts"].values())
    assert "request" in finished.out


@pytest.mark.parametrize("method", ["autoregressive", "speculative", "pearl"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_rounds_are_those_of_a_full_batch_that_only_decodes(
    method: str, temperature: float, models: LoadedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real verdicts, at the asked acceptance, and the text that the target writes whatever was drafted."""
    records: list[RoundRecord] = []
    put_in = measuring._put_in

    def put_in_and_observe(llm: object, load: Load, watch: Stopwatch) -> None:
        put_in(llm, load, watch)  # type: ignore[arg-type]
        llm.engine.observer = records.append  # type: ignore[attr-defined]

    monkeypatch.setattr(measuring, "_put_in", put_in_and_observe)
    load = Load(method, 5, 40, temperature, window=4, rounds=60, acceptance=0.7)  # type: ignore[arg-type]
    measure(models, CONFIG, load, lambda: False)
    text = Text(models.vocab_size, torch.bfloat16, 0.7)
    written: dict[int, list[int]] = {seed: [] for seed in range(5)}
    ids: dict[int, int] = {}
    tested = accepted = 0
    for record in records:
        for work in record.plan.target.work:
            ids[work.state.request_id] = work.state.seed
        for request_id, decision in record.result.decisions.items():
            written[ids[request_id]] += decision.committed
            tested += min(decision.accepted + 1, len(decision.tested))
            accepted += decision.accepted
    for seed, tokens in written.items():
        assert len(tokens) > 20
        assert tokens == [256 + word for word in text.words(seed, 40, 256)][: len(tokens)]
    steady = records[8:]
    assert all(len(r.plan.target.work) in (0, 5) and len(r.plan.draft.work) in (0, 5) for r in steady)
    if method == "autoregressive":
        assert tested == 0
    else:
        assert accepted / tested == pytest.approx(0.7, abs=0.08)


def test_parts_add_up_and_hold_what_happened_in_them() -> None:
    watch = Stopwatch()
    watch.lap()
    begin = time.perf_counter()
    with watch.part("outer"):
        time.sleep(0.01)
        watch.timed("inner", time.sleep)(0.02)
        with pytest.raises(ZeroDivisionError), watch.part("inner"):
            _ = 1 // 0
    parts = watch.lap()
    whole = time.perf_counter() - begin
    assert sum(parts.values()) == pytest.approx(whole, abs=0.002)
    assert parts["outer"] >= 0.01
    assert parts["inner"] >= 0.02
    assert parts["rest"] < 0.005
    assert "inner" not in watch.lap()


def test_models_and_kernels_are_not_the_hosts(models: LoadedModels, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Load("autoregressive", 1, 20, 0.0, window=4, rounds=5, acceptance=0.8)
    monkeypatch.setattr("bench.round_cost.instant.InstantTarget._logits", _slow)
    assert measure(models, CONFIG, load, lambda: False).us_per_round < 20_000
    schedule = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (time.sleep(0.03), schedule(engine))[1])
    cost = measure(models, CONFIG, load, lambda: False)
    assert cost.us_per_round > 30_000
    assert cost.parts["rest"] > 30_000
    assert MODELS not in cost.parts


def _slow(target: object, work: list[object]) -> torch.Tensor:
    time.sleep(0.03)
    return torch.zeros(len(work), 4096, dtype=torch.bfloat16).index_fill_(1, torch.tensor([300]), 1.0)


def test_what_was_measured_before_an_interruption_is_kept(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Load] = []

    def measure_two(models: object, config: object, load: Load, stopped: object) -> measuring.Cost:
        if len(done) == 2:
            raise measuring.Interrupted
        done.append(load)
        return measuring.Cost(1.0, 1.0, {"rest": 1.0})

    monkeypatch.setattr(program, "measure", measure_two)
    out = tmp_path / "cost.json"
    script("--batch", "1", "--context", "20", "--json", str(out))
    assert [r["method"] for r in json.loads(out.read_text())["results"]] == ["autoregressive", "speculative"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "1,x"), "--batch takes integers >= 1"),
        (("--context", "0"), "--context takes integers >= 1"),
        (("--acceptance", "1.5"), "acceptance"),
        (("--json", "/nowhere/at/all.json"), "--json"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(
    arguments: tuple[str, ...], message: str, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "load_models", lambda *_: pytest.fail("something was loaded"))
    finished = script(*arguments)
    assert finished.code == 2
    assert message in finished.err

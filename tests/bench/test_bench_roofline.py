"""``bench/cpu_roofline.py``: the report that it writes, what an interruption leaves, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bench_support import Finished, run_script

from bench.roofline import program
from bench.roofline.generators import Contender, Generated, LeftOut, Run, compare, pearl_contenders
from bench.roofline.report import Bandwidth, Forward, Generation, Operator, Report, draw, write_json
from pearl.bench import options
from pearl.errors import ConfigurationError
from pearl.llm import LLM

Script = Callable[..., Finished]
TOP_KEYS = {
    "machine", "versions", "commit", "date", "command", "settings", "dtype", "interrupted", "read_bandwidth_gb_s",
    "read_bandwidth", "peak_gflop_s", "forwards", "ops", "generation", "left_out",
}  # fmt: skip


SCRIPT = "cpu_roofline.py"


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> Finished:
    with pytest.MonkeyPatch.context() as patch:
        return run_script(SCRIPT, *arguments, monkeypatch=patch, capsys=capsys)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any], Path]:
    """One quick run: what was shown, the JSON, and the picture."""
    folder = tmp_path_factory.mktemp("roofline")
    out, picture = folder / "report.json", folder / "roofline.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "llama_cpp.llama_cpp", None)  # type: ignore[arg-type]  # makes its import fail
        patch.setattr(program, "cpu_cores", lambda: 2)
        patch.setattr(sys, "argv", ["bench/cpu_roofline.py", "--quick"])
        shown = _capture(lambda: program.roofline(quick=True, json_out=out, plot=picture, **DEFAULTS))
    return shown, json.loads(out.read_text()), picture


DEFAULTS: dict[str, Any] = {
    "dataset": "builtin", "prompts": 8, "max_tokens": 96, "repeats": 5, "engines": "pearl,transformers,llama.cpp",
    "rows": "1,2,4,8,16", "context": 128, "pace": "auto", "target": None, "draft": None, "dtype": "auto",
}  # fmt: skip


def _capture(call: Callable[[], None]) -> str:
    """What the call prints to a console of 80 columns."""
    import io

    from rich.console import Console

    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "Console", lambda: Console(file=text, width=80))
        call()
    return text.getvalue()


@pytest.fixture
def report(measured: tuple[str, dict[str, Any], Path]) -> dict[str, Any]:
    return measured[1]


def test_the_report_has_everything(report: dict[str, Any]) -> None:
    assert set(report) == TOP_KEYS
    assert report["interrupted"] is False
    assert report["dtype"] == "bfloat16"
    assert report["command"] == "bench/cpu_roofline.py --quick"
    assert {(b["buffer"], b["threads"]) for b in report["read_bandwidth"]} == {
        (buffer, threads) for buffer in ("memory", "target", "draft") for threads in (1, 2)
    }
    assert [(f["model"], f["rows"]) for f in report["forwards"]] == [
        ("target", 1), ("target", 4), ("draft", 1), ("draft", 4),
    ]  # fmt: skip
    assert {(o["model"], o["rows"]) for o in report["ops"]} == {(m, n) for m in ("target", "draft") for n in (1, 8)}


def test_shares_are_of_the_measured_limits(report: dict[str, Any]) -> None:
    limits = {b["buffer"]: b["gb_s"] for b in report["read_bandwidth"] if b["threads"] == 1}
    assert report["read_bandwidth_gb_s"] == limits["memory"] > 0.1
    for f in report["forwards"]:
        assert f["gb_s"] == pytest.approx(f["bytes"] / f["ms"] / 1e6)
        assert f["share_of_limit"] == pytest.approx(f["gb_s"] / limits[f["model"]])
        assert f["share_of_memory_bandwidth"] == pytest.approx(f["gb_s"] / limits["memory"])
        assert f["gflop_s"] == pytest.approx(f["flops"] / f["ms"] / 1e6)
    for o in report["ops"]:
        assert 0 < o["us"] < o["call_us"]
        if o["share_of_limit"] is not None:
            assert o["share_of_limit"] == pytest.approx(o["bytes"] / o["us"] / 1e3 / limits[o["model"]])


def test_the_target_costs_more_than_the_draft(report: dict[str, Any]) -> None:
    costs = {(f["model"], f["rows"]): f for f in report["forwards"]}
    for rows in (1, 4):
        assert costs["target", rows]["bytes"] > 5 * costs["draft", rows]["bytes"]
        assert costs["target", rows]["ms"] > costs["draft", rows]["ms"]


def test_all_engines_generate_side_by_side(report: dict[str, Any]) -> None:
    found = [(g["engine"], g["method"], g["threads"]) for g in report["generation"]]
    assert found == [
        ("pearl", "autoregressive", 1), ("pearl", "speculative", 1), ("pearl", "pearl", 2),
        ("pearl", "autoregressive", 2), ("pearl", "speculative", 2),
        ("transformers", "generate", 1), ("transformers", "assisted", 1),
        ("transformers", "generate", 2), ("transformers", "assisted", 2),
    ]  # fmt: skip
    fastest = max(g["tok_s"] for g in report["generation"] if g["method"] == "generate")
    for g in report["generation"]:
        assert 1 <= g["tokens"] <= 8
        assert g["dtype"] == "bfloat16"
        assert g["tok_s"] == pytest.approx(g["tokens"] / g["seconds"])
        assert g["speedup"] == pytest.approx(g["tok_s"] / fastest)
        if g["engine"] == "pearl":
            assert g["same_tokens"] == 1.0
            assert g["decode_tok_s"] > 1
        else:
            assert g["decode_tok_s"] is None


def test_what_is_not_installed_is_left_out_with_the_reason(report: dict[str, Any]) -> None:
    ((entry),) = report["left_out"]
    assert entry["engine"] == "llama.cpp"
    assert "pip install --no-binary llama-cpp-python llama-cpp-python gguf" in entry["reason"]


def test_the_tables_fit_80_columns(measured: tuple[str, dict[str, Any], Path]) -> None:
    text, report, _ = measured
    assert "…" not in text
    for g in report["generation"]:
        assert f"{g['tok_s']:.1f}" in text
    for word in ("read bandwidth", "lm_head", "verify_attention", "left out: llama.cpp"):
        assert word in text


def test_a_picture_is_drawn(measured: tuple[str, dict[str, Any], Path]) -> None:
    data = measured[2].read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert 20_000 < len(data) < 1_000_000


class FakeGuard:
    """Ctrl-C is pressed before the n-th time that someone asks."""

    def __init__(self, after: int) -> None:
        self._left = after

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0

    def __enter__(self) -> FakeGuard:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("after", "forwards", "generated"),
    [(0, False, set()), (1, True, set()), (8, True, {"autoregressive"})],
    ids=["at once", "after a round of forwards", "after one generation"],
)
def test_an_interruption_keeps_what_was_measured(
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    forwards: bool,
    generated: set[str],
) -> None:
    # Asked before each of three rounds of forwards, before generating, and before each of three warm-ups and runs.
    monkeypatch.setattr(program, "InterruptGuard", lambda: FakeGuard(after))
    monkeypatch.setattr(program, "cpu_cores", lambda: 1)
    out = tmp_path / "report.json"
    finished = script("--quick", "--engines", "pearl", "--rows", "1", "--json", str(out), "--plot", f"{out}.svg")
    assert finished.code == 130
    report = json.loads(out.read_text())
    assert set(report) == TOP_KEYS
    assert report["interrupted"] is True
    assert bool(report["forwards"]) == bool(report["read_bandwidth"]) == forwards
    assert {g["method"] for g in report["generation"]} == generated
    assert "interrupted: what is missing was not measured" in finished.out
    assert Path(f"{out}.svg").exists()


@dataclass
class Scripted:
    """Returns the next of its answers."""

    answers: list[list[list[int]]]

    def __call__(self, prompts: list[list[int]], max_tokens: int, /) -> Generated:
        return Generated(self.answers.pop(0))


def contender(method: str, *answers: list[list[int]], equals: str | None = None) -> Contender:
    return Contender("pearl", method, 1, Scripted(list(answers)), "float32", equals)


def test_a_balanced_pace_is_for_the_one_method_that_has_it() -> None:
    with LLM(pace="balanced", prefix_caching=False, max_num_seqs=1) as llm, ExitStack() as stack:
        assert [c.method for c in pearl_contenders(stack, llm, 1)] == ["autoregressive", "speculative", "pearl"]


def test_runs_are_interleaved_and_the_warm_up_is_not_one() -> None:
    a, b = (contender(name, [[0]], [[1, 2]], [[1, 2]]) for name in "ab")
    order: list[str] = []
    compare([a, b], [[7]], 4, 2, lambda: False, order.append)
    assert order == ["pearl a, 1 thread", "pearl b, 1 thread", "pearl b, 1 thread", "pearl a, 1 thread"]
    assert [run.tokens for run in a.runs] == [[[1, 2]]] * 2


def test_decoding_is_timed_without_the_prompts() -> None:
    run = Run(Generated([[1, 2, 3], [4, 5, 6, 7]], prompt_seconds=1.5), seconds=2.0)
    assert run.tok_s == 7 / 2.0
    assert run.decode_tok_s == 5 / 0.5
    assert Run(Generated([[1, 2]]), 2.0).decode_tok_s is None  # nobody knows
    assert Run(Generated([[1]], 1.0), 2.0).decode_tok_s is None  # nothing follows


def test_other_tokens_than_autoregressive_decoding_are_an_error() -> None:
    a = contender("autoregressive", [[0]], [[1, 2]])
    b = contender("pearl", [[0]], [[1, 3]], equals=a.name)
    with pytest.raises(ConfigurationError, match="pearl pearl, 1 thread returned other tokens than pearl auto"):
        compare([a, b], [[7]], 4, 1, lambda: False, lambda name: None)


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "LLM", lambda **_: pytest.fail("models were loaded"))


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--engines", "vllm"), "'vllm'"),
        (("--engines", "pearl,pearl"), "at most once"),
        (("--engines", ","), "--engines"),
        (("--rows", "1,x"), "--rows"),
        (("--rows", "0"), "--rows"),
        (("--rows", "9", "--context", "8"), "1 to the context's 8"),
        (("--rows", "9" * 5000), "1 to the context's 128"),
        (("--json", "/no/such/folder/report.json"), "/no/such/folder"),
        (("--plot", "/tmp"), "/tmp"),
        (("--plot", "picture.pdf"), "picture.pdf"),
        (("--draft", "ngram"), "draft model"),
        (("--dataset", "nothing-of-the-sort"), "nothing-of-the-sort"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_bad_options_are_refused_in_one_line(script: Script, arguments: tuple[str, ...], message: str) -> None:
    finished = script(*arguments)
    assert finished.code == 2
    assert message in finished.err
    assert finished.err.startswith("error: ")
    assert finished.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--pace", "magic"), "pace"),
        (("--dtype", "int8"), "dtype"),
        (("--max-tokens", "5000"), "positions"),
        (("--context", "5000"), "--context 5000"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_the_models_do_not_allow_is_refused(script: Script, arguments: tuple[str, ...], message: str) -> None:
    finished = script(*arguments)
    assert finished.code == 2
    assert message in finished.err


def test_plot_says_what_to_install(
    script: Script, monkeypatch: pytest.MonkeyPatch, no_work: None, tmp_path: Path
) -> None:
    find = options.importlib.util.find_spec
    monkeypatch.setattr(
        options.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )  # fmt: skip
    finished = script("--plot", str(tmp_path / "out.png"))
    assert "pip install matplotlib" in finished.err


def by_hand() -> Report:
    forwards = [Forward("target", n, 2.0, 30_000_000, 15.0, 0.5, 0.75, 30_000_000 * n, 15.0 * n) for n in (1, 16)]
    return Report(
        {"repeats": 1},
        "float32",
        100.0,
        [Bandwidth("memory", 1, 1 << 28, 20.0), Bandwidth("target", 1, 30_000_000, 30.0)],
        forwards,
        [Operator("target", 1, "qkv", 8, 10.0, 15.0, 500_000, None)],
        [Generation("pearl", "pearl", 2, "float32", 1000.0, 1100.0, 96, 0.096, None, 1.0)],
        [LeftOut("llama.cpp", "not installed")],
    )


def test_a_report_by_hand_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, by_hand())
    read = json.loads(path.read_text())
    assert read["read_bandwidth_gb_s"] == 20.0
    assert Forward(**read["forwards"][1]) == by_hand().forwards[1]
    assert Operator(**read["ops"][0]) == by_hand().operators[0]
    assert Generation(**read["generation"][0]) == by_hand().generation[0]


def test_the_picture_names_what_it_shows(tmp_path: Path) -> None:
    """Matplotlib draws text as shapes, each with its text as a comment."""
    path = tmp_path / "roofline.svg"
    draw(by_hand(), path)
    text = path.read_text("utf-8")
    for words in ("20 GB/s, memory", "30 GB/s, buffer as the target's weights", "pearl pearl, 2 threads", "1000"):
        assert f"<!-- {words} -->" in text

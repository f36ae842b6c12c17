"""``bench/train_pair.py``: a pair trained in seconds, interrupted, continued and loaded."""

from __future__ import annotations

import json
import math
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from bench.shared.malloc import CPU_ENVIRONMENT
from bench.training import program, trainer
from bench.training.corpus import Corpus, read_files
from bench.training.models import Shape, load_init
from bench.training.trainer import Options, Trainer
from pearl import LLM, SamplingParams
from pearl.models import bundled_path

SHAPE = "64:1:1:1:64"
STEP = 25.0  # seconds of the training clock that a step takes
TARGET_STEPS, DRAFT_STEPS = 12, 6  # of a whole run: 5 and 2.5 minutes
SETTINGS = (
    *("--target", SHAPE, "--draft", SHAPE, "--target-minutes", "5", "--draft-minutes", "2.5", "--vocab", "300"),
    *("--sequence", "32", "--micro-batch", "2", "--accumulate", "2", "--no-compile"),
)
TOKENS_PER_STEP = 32 * 2 * 2


class Killed(BaseException):
    """The process ends here."""


@dataclass
class TrainingClock:
    """Each look at it is a step later; ``kill_at`` ends the run at that look."""

    now: float = 0.0
    kill_at: float = math.inf
    looks: int = field(default=0)

    def monotonic(self) -> float:
        self.now += STEP
        self.looks += 1
        if self.looks >= self.kill_at:
            raise Killed
        return self.now


def sources(count: int) -> dict[str, str]:
    return {
        f"m{i}.py": "".join(f"def f{i}_{j}(x):\n    return x + {i * j}\n\n\n" for j in range(20)) for i in range(count)
    }


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> TrainingClock:
    """A few small files to read, the CPU, and a clock of the training's own."""
    monkeypatch.setattr(program, "read_files", lambda: (sources(6), {"held/out.py": sources(8)["m7.py"]}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in CPU_ENVIRONMENT.items():  # otherwise the script starts itself again
        monkeypatch.setenv(name, value)
    return set_clock(monkeypatch)


def set_clock(monkeypatch: pytest.MonkeyPatch, **options: float) -> TrainingClock:
    clock = TrainingClock(**options)
    monkeypatch.setattr(trainer, "time", clock)
    return clock


def train(*arguments: str | Path) -> Result:
    app = typer.Typer()
    app.command()(program.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"{name}.checkpoint.pt")


@pytest.mark.parametrize("text", ["384:8:6:2", "384:8:6:2:1152:1", "a:1:1:1:1", "64:0:1:1:64", "64:-1:1:1:64", ""])
def test_a_shape_is_five_positive_integers(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="five positive integers") as error:
        Shape.parse(text)
    assert repr(text) in str(error.value)


def test_a_shape_builds_its_model() -> None:
    shape = Shape.parse("128:3:2:1:96")
    assert shape == Shape(hidden=128, layers=3, heads=2, kv_heads=1, ffn=96)
    config = shape.build(300).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (128, 3, 2)
    assert (config.num_key_value_heads, config.intermediate_size, config.vocab_size) == (1, 96, 300)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of 200 modules whose names' sums fall on each remainder of 50 four times."""
    root = tmp_path / "lib"
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    for number in range(200):
        write(root / "package" / f"{'a' * number}.py", f"# {number}\n" * 60)
    return root


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def test_the_split_is_by_name_disjoint_and_the_same_each_time(library: Path) -> None:
    train, heldout = read_files()
    assert not set(train) & set(heldout)
    assert len(train) + len(heldout) == 200
    assert len(heldout) == 4
    assert read_files() == (train, heldout)
    for name in (*train, *heldout):  # other text, and another file more: the names decide
        write(library / name, "# other\n" * 60)
    write(library / "new.py", "# new\n" * 60)
    again = read_files()
    assert [set(names) - {"new.py"} for names in again] == [set(train), set(heldout)]


def test_what_is_no_library_source_is_left_out(library: Path) -> None:
    before = read_files()
    write(library / "site-packages" / "other" / "module.py", "# theirs\n" * 60)
    write(library / "short.py", "pass\n")
    write(library / "test" / "table.py", "0,\n" * 100_000)
    write(library / "notes.txt", "text\n" * 100)
    (library / "latin.py").write_bytes(b"# \xe9\n" * 100)
    assert read_files() == before


def test_a_run_makes_a_pair_that_the_engine_loads(clock: TrainingClock, tmp_path: Path) -> None:
    out = tmp_path / "pair"
    assert train(out, *SETTINGS).exit_code == 0
    assert (out / "heldout.txt").read_text() == "held/out.py\n"
    report = json.loads((out / "report.json").read_text())
    assert (report["target_tokens"], report["draft_tokens"]) == (
        TARGET_STEPS * TOKENS_PER_STEP,
        DRAFT_STEPS * TOKENS_PER_STEP,
    )
    assert 0 < report["target_loss"] < 2 * math.log(300)
    assert 0 < report["draft_loss"] < 2 * math.log(300)
    assert 0 <= report["greedy_agreement"] <= 1
    assert 0 < report["overlap"] <= 1
    for name in ("target", "draft"):
        files = {path.name for path in (out / name).iterdir()}
        assert files >= {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
        model = AutoModelForCausalLM.from_pretrained(out / name)
        assert (model.config.architectures, model.dtype) == (["LlamaForCausalLM"], torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(out / "target")
    assert (
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}, {"role": "user", "content": "you"}], tokenize=False
        )
        == "hello\nyou\n"
    )
    with LLM(str(out / "target"), str(out / "draft"), device="cpu", dtype="float32", window=2) as llm:
        output = llm.generate("def f1_1(x):\n", SamplingParams(max_tokens=5, ignore_eos=True))[0].outputs[0]
    assert (len(output.token_ids), output.error) == (5, None)


def test_an_interrupted_run_continues_from_its_checkpoint(
    clock: TrainingClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is written when more than two minutes have passed: after step 5 of 25 seconds."""
    restored: list[tuple[str, int, float]] = []
    restore = Trainer.restore

    def note(self: Any) -> bool:
        found: bool = restore(self)
        restored.append((self.name, self.step, self.elapsed))
        return found

    monkeypatch.setattr(Trainer, "restore", note)
    set_clock(monkeypatch, kill_at=9)  # the first look only starts the clock
    with pytest.raises(Killed):
        train(tmp_path, *SETTINGS)
    saved = checkpoint(tmp_path, "target")
    assert (saved["step"], saved["elapsed"], saved["tokens"]) == (5, 125, 5 * TOKENS_PER_STEP)
    assert not (tmp_path / "report.json").exists()

    clock = set_clock(monkeypatch)
    assert train(tmp_path, *SETTINGS).exit_code == 0
    assert restored == [("target", 0, 0), ("target", 5, 125), ("draft", 0, 0)]
    assert clock.looks == 1 + (TARGET_STEPS - 5) + 1 + DRAFT_STEPS
    for name, steps in (("target", TARGET_STEPS), ("draft", DRAFT_STEPS)):
        done = checkpoint(tmp_path, name)
        assert (done["step"], done["elapsed"]) == (steps, steps * STEP)
        assert done["tokens"] == steps * TOKENS_PER_STEP

    before = {name: checkpoint(tmp_path, name)["model"] for name in ("target", "draft")}
    clock = set_clock(monkeypatch)
    assert train(tmp_path, *SETTINGS).exit_code == 0  # a finished run has nothing left to train
    assert clock.looks == 2
    for name, weights in before.items():
        for key, value in checkpoint(tmp_path, name)["model"].items():
            assert torch.equal(value, weights[key])


def test_a_suspended_process_does_not_spend_its_training_time(
    clock: TrainingClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Corpus(*(np.arange(400, dtype=np.uint16) % 300 for _ in range(2)))
    options = Options("cpu", 16, 2, 1, False)
    run = Trainer("target", Shape.parse(SHAPE).build(300), corpus, tmp_path, options, 1e-3)
    monkeypatch.setattr(clock, "monotonic", iter([0.0, 20.0, 5000.0, 5020.0]).__next__)
    run.fit(65 / 60, Console())
    assert (run.step, run.elapsed) == (3, 20 + 30 + 20)


def test_training_lowers_the_loss(clock: TrainingClock, tmp_path: Path) -> None:
    corpus = Corpus(*(np.arange(3000, dtype=np.uint16) % 37 for _ in range(2)))
    options = Options("cpu", 32, 2, 1, False)
    torch.manual_seed(0)
    run = Trainer("target", Shape.parse(SHAPE).build(300), corpus, tmp_path, options, 1e-2)
    before = run.heldout_loss()
    run.fit(60 * STEP / 60, Console())
    assert run.step == 60
    assert run.heldout_loss() < 0.5 * before


def test_an_existing_pair_gives_its_tokenizer_and_weights() -> None:
    shape = Shape.parse(SHAPE)
    assert load_init(bundled_path("target").parent, "draft", shape, 300).config.hidden_size != 64
    assert load_init(None, "draft", shape, 300).config.hidden_size == 64


def test_a_folder_without_a_pair_is_refused(clock: TrainingClock, tmp_path: Path) -> None:
    result = train(tmp_path / "out", *SETTINGS, "--init", tmp_path / "nothing")
    assert result.exit_code == 2
    assert f"{tmp_path / 'nothing'} holds no pair: target/tokenizer.json is missing" in result.output
    assert not (tmp_path / "out").exists()


def test_a_wrong_shape_is_refused(clock: TrainingClock, tmp_path: Path) -> None:
    result = train(tmp_path / "out", *SETTINGS, "--draft", "64:1")
    assert result.exit_code == 2
    assert "'64:1' is not hidden:layers:heads:kv_heads:ffn" in result.output
    assert not (tmp_path / "out").exists()

"""``bench/cpu_decoding.py``: what is compared with llama.cpp, process by process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_support import Finished
from transformers import AutoModelForCausalLM

from bench.roofline import decoding, decoding_process
from bench.roofline.decoding_process import Job, Timed, run
from bench.roofline.near_ties import first_difference, widest_gap
from pearl.errors import ConfigurationError
from pearl.models import bundled_path

Script = Callable[..., Finished]
SCRIPT = "cpu_decoding.py"
DRAFT = str(bundled_path("draft"))
PROMPT = [5, 6, 7, 300]


def job(**changes: Any) -> Job:
    values = {"engine": "pearl", "model": DRAFT, "dtype": "float32", "threads": 1, "prompts": [PROMPT, [9, 8]],
              "max_tokens": 6, "passes": 2}  # fmt: skip
    return Job(**{**values, **changes})


@pytest.fixture(scope="module")
def judge() -> Any:
    return AutoModelForCausalLM.from_pretrained(DRAFT, dtype=torch.float32)


def greedy(judge: Any, prompt: list[int], count: int) -> list[int]:
    tokens: list[int] = []
    for _ in range(count):
        with torch.inference_mode():
            tokens.append(int(judge(torch.tensor([prompt + tokens])).logits[0, -1].argmax()))
    return tokens


def test_our_process_decodes_ids_and_no_end_stops_it(judge: Any) -> None:
    timed = run(job())
    assert timed.tokens == [greedy(judge, prompt, 6) for prompt in (PROMPT, [9, 8])]
    assert timed.prompt_seconds > 0
    assert timed.decode_seconds > 0


class ScriptedLlama:
    """Stands for LlamaCpp: the token after t is t + 1, and the clock ticks in a prompt and in a step."""

    def __init__(self, path: Path, positions: int, threads: int) -> None:
        self.build, self.opened, self.closed = "AVX", (path, positions, threads), False
        ScriptedLlama.latest = self

    latest: ScriptedLlama

    def start(self, prompt: list[int]) -> int:
        return prompt[-1] + 1

    def step(self, token: int) -> int:
        return token + 1

    def close(self) -> None:
        self.closed = True


def test_llama_cpp_gets_the_same_ids_and_gives_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding_process, "LlamaCpp", ScriptedLlama)
    timed = run(job(engine="llama.cpp", model="x.gguf", threads=2))
    assert timed.tokens == [[301, 302, 303, 304, 305, 306], [9, 10, 11, 12, 13, 14]]
    assert timed.build == "AVX"
    assert ScriptedLlama.latest.opened == (Path("x.gguf"), len(PROMPT) + 6, 2)
    assert ScriptedLlama.latest.closed


def test_speeds_leave_prompts_and_first_tokens_out() -> None:
    runs = [Timed([], 0.4, seconds) for seconds in (1.0, 2.0, 4.0)]
    speed = decoding.speed_of("pearl", job(), runs)
    assert speed.tok_s == [20.0, 10.0, 5.0]  # 2 passes, 2 prompts, 5 tokens after each first
    assert (speed.median, speed.spread, speed.prompt_ms) == (10.0, 1.5, pytest.approx(100.0))


def test_a_gap_is_of_the_less_likely_choice(judge: Any) -> None:
    with torch.inference_mode():
        logits = judge(torch.tensor([[*PROMPT, 11]])).logits[0, -1]
    best, second, third = logits.topk(3).indices.tolist()
    ours, theirs = [[11, second, 1], [3]], [[11, third, 2], [3]]
    expected = float(logits[best] - logits[third])
    assert widest_gap(DRAFT, [PROMPT, [9]], ours, theirs) == pytest.approx(expected, abs=1e-4)
    assert widest_gap(DRAFT, [PROMPT], [[1, 2]], [[1, 2, 3]]) is None
    assert (first_difference([1, 2], [1, 3]), first_difference([1], [1, 2])) == (1, None)


def test_processes_take_turns_and_neighbours_make_a_ratio(
    script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[Job] = []

    def measured(one: Job) -> Timed:
        started.append(one)
        seconds = {"pearl": 1.0, "llama.cpp": 1.5}[one.engine]
        return Timed([[1, 2, 3]] * len(one.prompts), 0.1, seconds)

    monkeypatch.setattr(decoding, "_run", measured)
    monkeypatch.setattr(decoding, "load_library", lambda: None)
    monkeypatch.setattr(decoding, "write_gguf", lambda folder, path, dtype: path.touch())
    out = tmp_path / "report.json"
    finished = script("--target", DRAFT, "--prompts", "2", "--pairs", "2", "--threads", "1", "--json", str(out))
    assert finished.code == 0, finished.err
    assert [one.engine for one in started] == ["pearl", "llama.cpp", "llama.cpp", "pearl"]
    assert len({json.dumps([one.prompts, one.max_tokens, one.passes, one.threads]) for one in started}) == 1
    (result,) = json.loads(out.read_text())["results"]
    assert result["ratios"] == [1.5, 1.5]
    assert (result["equal_prompts"], result["prompts"], result["widest_gap"]) == (2, 2, None)
    assert "ratio of neighbours: 1.50" in finished.out


def test_a_process_has_no_openmp_settings_and_its_failure_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    seen: dict[str, Any] = {}

    def fake(command: list[str], **options: Any) -> Any:
        seen.update(options["env"])
        return type("Done", (), {"returncode": 1, "stderr": "Traceback\nValueError: no such model\n", "stdout": ""})

    monkeypatch.setattr(decoding.subprocess, "run", fake)
    with pytest.raises(ConfigurationError, match=r"^pearl with 1 thread\(s\): ValueError: no such model$"):
        decoding._run(job())
    assert seen["PYTHONPATH"]
    assert not [name for name in seen if name.startswith("OMP_")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--dtype", "int8"), "--dtype"), (("--threads", "1,x"), "--threads"), (("--threads", "0"), "--threads"),
     (("--json", "/no/such/folder/x.json"), "/no/such/folder"), (("--max-tokens", "5000"), "positions")],
)  # fmt: skip
def test_bad_options_are_refused(
    script: Script, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(decoding, "load_library", lambda: None)
    finished = script("--target", DRAFT, *arguments)
    assert finished.code == 2
    assert message in finished.err
    assert finished.err.count("\n") == 1


def test_without_llama_cpp_it_says_what_to_install(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp.llama_cpp", None)  # type: ignore[arg-type]  # makes its import fail
    finished = script("--target", DRAFT)
    assert finished.code == 2
    assert "pip install --no-binary llama-cpp-python llama-cpp-python gguf" in finished.err

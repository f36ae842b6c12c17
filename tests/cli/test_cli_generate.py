"""``pearl generate`` without a terminal: scripts and pipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_support import PROMPT, invoke

from pearl import LLM, SamplingParams
from pearl.cli.generate import read_prompt


@pytest.fixture(scope="module")
def expected(llm: LLM) -> str:
    return llm.generate(PROMPT, SamplingParams(max_tokens=24))[0].outputs[0].text


def test_the_text_goes_to_stdout_and_the_closing_line_to_stderr(expected: str) -> None:
    result = invoke(PROMPT, "--max-tokens", "24")
    assert result.exit_code == 0
    assert result.stdout == expected
    assert result.stderr.count("\n") == 1
    for part in ("24 tokens · ", " tok/s · ", "first token after ", " · pearl · ", "acceptance ", "mean accepted ",
                 "tokens per target forward", " MB resident\n"):  # fmt: skip
        assert part in result.stderr


@pytest.mark.parametrize("arguments", [(), ("-",)])
def test_prompt_from_standard_input(arguments: tuple[str, ...], expected: str) -> None:
    assert invoke(*arguments, "--max-tokens", "24", stdin=PROMPT + "\n").stdout == expected


def test_prompt_from_a_file(tmp_path: Path, expected: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    assert invoke("--file", str(file), "--max-tokens", "24").stdout == expected


def test_what_editors_add_to_a_file_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    """A byte order mark, and line ends of another system."""
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfdef f():\r\n    return 1\r\n")
    assert read_prompt(None, file) == "def f():\n    return 1"


def test_json_is_one_object(llm: LLM) -> None:
    result = invoke(PROMPT, "--max-tokens", "24", "--json")
    wanted = llm.generate(PROMPT, SamplingParams(max_tokens=24))[0].outputs[0]
    shown = json.loads(result.stdout)
    assert (shown["text"], shown["token_ids"], shown["finish_reason"]) == (wanted.text, wanted.token_ids, "length")
    assert shown["drafted"] == wanted.drafted
    assert shown["metrics"]["output_tokens"] == 24
    assert 0 <= shown["metrics"]["acceptance_rate"] <= 1
    assert shown["metrics"]["time_to_first_token"] > 0
    assert result.stderr == ""


def test_sampling_options_reach_the_engine(llm: LLM) -> None:
    options = ["--temperature", "0.9", "--top-k", "40", "--top-p", "0.95", "--min-p", "0.01", "--seed", "7",
               "--repetition-penalty", "1.1", "--min-tokens", "4", "--max-tokens", "16"]  # fmt: skip
    params = SamplingParams(
        temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=7, repetition_penalty=1.1, min_tokens=4, max_tokens=16
    )
    assert invoke(PROMPT, *options).stdout == llm.generate(PROMPT, params)[0].outputs[0].text


def test_several_outputs_come_in_order(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=12, n=2)
    texts = [output.text for output in llm.generate(PROMPT, params)[0].outputs]
    result = invoke(PROMPT, "-n", "2", "--temperature", "1", "--seed", "3", "--max-tokens", "12")
    assert result.stdout == "".join(text if text.endswith("\n") else text + "\n" for text in texts)
    assert "1 of 2" in result.stderr
    shown = json.loads(
        invoke(PROMPT, "-n", "2", "--temperature", "1", "--seed", "3", "--max-tokens", "12", "--json").stdout
    )
    assert [output["text"] for output in shown["outputs"]] == texts


def test_stop_text_is_not_shown(llm: LLM, expected: str) -> None:
    stop = expected[6:9]
    result = invoke(PROMPT, "--max-tokens", "24", "--stop", stop, "--stop", "never written")
    assert result.stdout == expected[: expected.index(stop)]


@pytest.mark.parametrize("arguments", [("--method", "autoregressive"), ("--draft", "ngram", "--no-pre-verify")])
def test_every_method_writes_the_same_text(arguments: tuple[str, ...], expected: str) -> None:
    assert invoke(PROMPT, "--max-tokens", "24", *arguments).stdout == expected

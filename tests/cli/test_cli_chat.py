"""``pearl chat``, as typed at a terminal and as piped in."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from cli_pty import PtyProcess
from cli_support import SETTLED
from tokenizers import Tokenizer as Backend
from typer.testing import CliRunner

from pearl.cli.app import application, run

CLOSING = "per target forward"


def test_a_conversation_at_the_terminal(chat_model: Path) -> None:
    with PtyProcess("chat", "--target", str(chat_model), "--max-tokens", "256", "--ignore-eos", *SETTLED) as terminal:
        terminal.wait_for("> ")
        terminal.type("import os\n")
        assert "256 tokens" in terminal.wait_for(CLOSING)

        terminal.type("import sys\n")
        terminal.wait_for("\x1b[32m")
        terminal.type("\x03")
        assert "interrupted" in terminal.wait_for(CLOSING)
        terminal.type("/stats\n")
        terminal.wait_for("turns in the conversation: 2")

        terminal.type("/reset\n")
        terminal.wait_for("forgotten")
        terminal.type("/stats\n")
        terminal.wait_for("turns in the conversation: 0")

        terminal.wait_for("> ")
        time.sleep(0.2)  # readline shows its prompt a moment before it notices signals
        terminal.type("\x03")
        terminal.wait_for("Ctrl-D or /exit leaves")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.output


def test_a_piped_conversation_forgets_the_oldest_turns(chat_model: Path) -> None:
    typed = "/help\nx = 1\ny = 2\nz = 3\n/sing\n" + "w = 4 " * 100 + "\n/stats\n/exit\nnever asked\n"
    options = ["--dtype", "float32", "--window", "3", "--max-model-len", "48", "--max-tokens", "16", "--ignore-eos"]
    command = ["chat", "--target", str(chat_model), *options]
    result = CliRunner().invoke(application(), command, input=typed, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr.count(CLOSING) == 4  # three answers and /stats
    for said in (
        "/reset  forget",
        "the oldest turn was forgotten",
        "/sing is not a command",
        "the message alone makes a prompt of",
    ):
        assert said in result.stderr
    assert "never" not in result.stdout


def test_a_message_with_a_token_that_the_model_lacks_leaves_the_conversation_as_it_was(
    chat_model: Path, tmp_path: Path
) -> None:
    for file in chat_model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "tokenizer.json").unlink()
    backend = Backend.from_file(str(chat_model / "tokenizer.json"))
    backend.add_special_tokens(["<PRE>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    result = CliRunner().invoke(
        application(),
        ["chat", "--target", str(tmp_path), "--max-tokens", "4", *SETTLED],
        input="x = 1\n<PRE>\ny = 2\n/exit\n",
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert "token 4096 ('<PRE>'), outside the vocabulary [0, 4096)" in result.stderr
    assert result.stderr.count(CLOSING) == 2


def test_a_model_without_a_template_is_refused(mute_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--target", str(mute_model), *SETTLED]) == 2
    assert "no chat template" in capsys.readouterr().err

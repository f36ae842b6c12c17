"""``pearl chat``, as typed at a terminal and as piped in."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from cli_pty import PtyProcess
from cli_support import SETTLED
from tokenizers import Tokenizer as Backend
from typer.testing import CliRunner

from pearl.cli.app import application, main, run

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


def test_only_a_single_word_can_be_an_unknown_command(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A question may begin with a path; a line that is no text is refused alone; no line has a byte order mark."""
    typed = b"\xef\xbb\xbf/help\n/etc/passwd is what?\r\n/etc/passwd\ncaf\xe9\n/sing\n/\n/stats\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    monkeypatch.setattr("sys.argv", ["pearl", "chat", "--target", str(chat_model), "--max-tokens", "4", *SETTLED])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    told = capsys.readouterr().err
    assert "/reset  forget" in told
    assert "turns in the conversation: 2" in told
    assert "error: the line is not UTF-8 text: byte 0xe9 after 3 characters" in told
    assert "/sing is not a command" in told
    assert "/ is not a command" in told


def test_a_system_message_that_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--system", "\udce9"]) == 2
    assert "the system message is not UTF-8 text" in capsys.readouterr().err


def test_a_model_without_a_template_is_refused(mute_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--target", str(mute_model), *SETTLED]) == 2
    assert "no chat template" in capsys.readouterr().err

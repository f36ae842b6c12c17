"""``pearl chat``, as typed at a terminal and as piped in."""

from __future__ import annotations

from cli_pty import PtyProcess
from cli_support import SETTLED
from typer.testing import CliRunner

from pearl.cli.app import app

CLOSING = "per target forward"


def test_a_conversation_at_the_terminal() -> None:
    with PtyProcess("chat", "--max-tokens", "200", "--ignore-eos", *SETTLED) as terminal:
        terminal.wait_for("> ")
        terminal.type("import os\n")
        assert "200 tokens" in terminal.wait_for(CLOSING)

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

        terminal.type("\x03")
        terminal.wait_for("Ctrl-D or /exit leaves")
        terminal.type("\x04")
        assert terminal.wait() == 0
    assert "Traceback" not in terminal.output


def test_a_piped_conversation_forgets_the_oldest_turns() -> None:
    typed = "/help\nx = 1\ny = 2\nz = 3\n/sing\n" + "w = 4 " * 100 + "\n/stats\n/exit\nnever asked\n"
    options = ["--dtype", "float32", "--window", "3", "--max-model-len", "64", "--max-tokens", "16", "--ignore-eos"]
    result = CliRunner().invoke(app, ["chat", *options], input=typed, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr.count(CLOSING) == 4  # three answers and /stats
    assert "/reset  forget" in result.stderr
    assert "the oldest turn was forgotten" in result.stderr
    assert "/sing is not a command" in result.stderr
    assert "the message alone makes a prompt of" in result.stderr
    assert "never" not in result.stdout

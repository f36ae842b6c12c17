"""The command line is tested with the bundled pair; float32 and a fixed window make every run the same."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from pearl.cli.app import application

PROMPT = "def read_lines(path):\n"
SETTLED = ("--dtype", "float32", "--window", "3", "--max-model-len", "512")


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    """Run ``pearl generate`` in this process, with neither stream a terminal."""
    return CliRunner().invoke(application(), ["generate", *SETTLED, *arguments], input=stdin, catch_exceptions=False)

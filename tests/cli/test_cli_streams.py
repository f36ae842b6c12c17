"""Standard streams as shells leave them: closed, full, gone, or of a narrow encoding. Never a traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_pty import ROOT
from cli_support import PROMPT, SETTLED
from rich.console import Console

from pearl.cli import app
from pearl.cli.exits import FAILED, REFUSED
from pearl.cli.terminal import Terminal
from pearl.models import bundled_path

CLOSED = "it is closed"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("generate <&-", REFUSED, 'no prompt; write pearl generate "PROMPT"'),
        ("generate - <&-", REFUSED, "standard input is closed"),
        ("chat <&-", REFUSED, "standard input is closed"),
        ("generate x >&-", FAILED, f"standard output: {CLOSED}"),
        ("chat >&-", FAILED, f"standard output: {CLOSED}"),
        ("--help >&-", FAILED, f"standard output: {CLOSED}"),
        ("--version >/dev/full", FAILED, "standard output: No space left on device"),
        (r"""generate "$(printf 'caf\351')" """, REFUSED, "the prompt is not UTF-8 text: byte 0xe9 after 3 characters"),
        ("--version 2>&-", 0, ""),
    ],
)
def test_what_the_shell_did(command: str, code: int, message: str) -> None:
    line = ["sh", "-c", f'exec "$0" -m pearl.cli {command}', sys.executable]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == code, finished.stderr
    assert finished.stderr.startswith(f"error: {message}" if message else "")
    assert finished.stderr.count("\n") == bool(message)


def test_who_alone_types_pearl_sees_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run([]) == REFUSED
    shown = capsys.readouterr()
    assert "Usage:" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_a_full_disk(
    option: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(full, write_through=True))
        assert app.run(["generate", PROMPT, "--max-tokens", "4", *SETTLED, *option]) == FAILED
        monkeypatch.undo()
    assert capsys.readouterr().err == "error: standard output: No space left on device\n"


def test_a_report_for_a_full_disk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """``pearl bench --json``; the measurement itself is left out."""
    monkeypatch.setattr("pearl.bench.contest.Contest.run", lambda contest, console, ended: [])
    assert app.run(["bench", "--json", "/dev/full"]) == FAILED
    assert capsys.readouterr().err == "error: /dev/full: No space left on device\n"


def test_a_reader_that_has_enough_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as pipe:
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(pipe, write_through=True))
        assert app.run(["generate", PROMPT, "--max-tokens", "4", *SETTLED]) == FAILED
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


def test_notes_that_cannot_be_written_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        broken = io.TextIOWrapper(full, write_through=True)
        terminal = Terminal(Console(file=io.StringIO()), Console(file=broken))
        terminal.note("24 tokens")
        terminal.error("x")
        monkeypatch.setattr("sys.stderr", broken)
        assert app.run(["dance"]) == REFUSED
        monkeypatch.undo()


@pytest.fixture
def accented_model(tmp_path: Path) -> Path:
    """The bundled target with a tokenizer that decodes every "e" to "é"."""
    for file in bundled_path("target").iterdir():
        if file.name != "tokenizer.json":
            (tmp_path / file.name).symlink_to(file)
    tokenizer = json.loads((bundled_path("target") / "tokenizer.json").read_text("utf-8"))
    accent = {"type": "Replace", "pattern": {"String": "e"}, "content": "é"}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], accent]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return tmp_path


def test_an_encoding_that_lacks_characters_of_the_text(
    accented_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost, it is said once, and the exit code tells a script."""
    command = ["generate", PROMPT, "--target", str(accented_model), "--method", "autoregressive", "--dtype", "float32",
               "--max-model-len", "512", "--max-tokens", "24"]  # fmt: skip
    assert app.run(command) == 0
    text = capsys.readouterr().out
    assert text.count("é") > 1
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", narrow)
    assert app.run(command) == FAILED
    monkeypatch.undo()
    narrow.seek(0)
    assert narrow.read() == text.replace("é", r"\xe9")
    assert capsys.readouterr().err.count("standard output is ascii, which lacks characters of the text") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"caf\xe9", "standard input is not UTF-8 text: byte 0xe9 after 3 characters"),
        (b"\xff\xfex\x00", "standard input is not UTF-8 text: byte 0xff after 0 characters"),
        (b"\xef\xbb\xbf\n", "the prompt is empty"),
    ],
)
def test_standard_input_that_is_no_prompt(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    monkeypatch.setattr("sys.argv", ["pearl", "generate"])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == REFUSED
    assert capsys.readouterr().err.startswith(f"error: {message}")

"""What is refused is one sentence on standard error and exit code 2, never a traceback."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from cli_support import SETTLED

from pearl.cli import app
from pearl.cli.exits import FAILED, REFUSED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x", "--method", "magic"], "magic"),
        (["generate", "x", "--no-such-option"], "--no-such-option"),
        (["generate", "x", "--window", "0"], "window"),
        (["generate", "x", "--window", "many"], "window"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--temperature", "warm"], "--temperature"),
        (["generate", "x", "--top-p", "0"], "top_p"),
        (["generate", "x", "--kv-cache-memory", "lots"], "lots"),
        (["generate", "x", "--kv-cache-memory", "999999T"], "kv_cache_memory must be"),
        (["generate", "x", "--kv-cache-memory", "9" * 400], "kv_cache_memory must be"),
        (["generate", "x", "--window", "9" * 5000], "window must be"),
        (["generate", "x", "--target-threads", "100000"], "target_threads must be"),
        (["generate", "--file", "/dev/zero"], "/dev/zero is longer than"),
        (["generate", "x", "--device", "abacus"], "abacus"),
        (["generate", "x", "--target", "/no/such/model"], "there is no folder '/no/such/model': give one with"),
        (["generate", "x", "--method", "fast"], "'--method': 'fast' is not one of"),
        (["generate", ""], "empty"),
        (["generate", "-"], "empty"),
        (["generate", "caf\udce9"], "the prompt is not UTF-8 text: byte 0xe9 after 3 characters"),
        (["generate", "x\ud800"], "the lone surrogate U+D800 after 1 characters"),
        (["generate", "x", "--stop", "\udce9"], "--stop is not UTF-8 text"),
        (["generate", "x", "--file", "y"], "not both"),
        (["generate", "--file", "/no/such/prompt"], "/no/such/prompt"),
        (["chat", "--max-tokens", "0"], "max_tokens"),
        (["chat", "--target", "/no/such/model"], "/no/such/model"),
        (["info", "--dtype", "int3"], "int3"),
        (["info", "--head-dim", "-5"], "--head-dim"),
        (["info", "--head-dim", "9" * 20], "--head-dim"),
        (["dance"], "dance"),
        (["bench", "--methods", "pearl,pearl"], "--methods"),
        (["bench", "--no-such-option"], "--no-such-option"),
        (["bench", "--json", "/no/such/folder/report.json"], "/no/such/folder"),
    ],
)
def test_refusal(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setattr("pearl.cli.text_input.LONGEST_TEXT", 1000)
    assert app.run(arguments) == REFUSED
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1


def test_prompt_that_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompt.bin"
    file.write_bytes(b"\xff\xfe\xff")
    assert app.run(["generate", "--file", str(file)]) == REFUSED
    assert "not UTF-8" in capsys.readouterr().err


def test_prompt_longer_than_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["generate", "x = 1\n" * 100, "--max-model-len", "32"]) == REFUSED
    assert "the context holds 32" in capsys.readouterr().err


def test_a_round_that_fails_is_no_refusal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("bad memory")

    monkeypatch.setattr("pearl.engine.verifier.Verifier.verify", fails)
    assert app.run(["generate", "x", *SETTLED]) == FAILED
    assert re.fullmatch("error: the engine failed, the answer is incomplete: .*bad memory\n", capsys.readouterr().err)

"""``pearl generate`` on a terminal: colours, and Ctrl-C."""

from __future__ import annotations

import io
import re

import pytest
from cli_pty import PtyProcess
from cli_support import PROMPT, SETTLED
from rich.console import Console

from pearl import LLM, SamplingParams
from pearl.cli.terminal import DRAFTED, Terminal

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
GREEN, BOLD_YELLOW = "\x1b[32m", "\x1b[1;33m"


def screen(**options: bool) -> Terminal:
    out = Console(file=io.StringIO(), force_terminal=True, color_system="standard", **options)  # type: ignore[arg-type]
    return Terminal(out, Console(file=io.StringIO()))


def written(terminal: Terminal) -> str:
    assert isinstance(terminal.out.file, io.StringIO)
    return terminal.out.file.getvalue()


def test_text_keeps_tabs_markup_and_long_lines() -> None:
    terminal = screen()
    terminal.write("\t[bold]x[/]" + "y" * 300, DRAFTED)
    assert written(terminal) == GREEN + "\t[bold]x[/]" + "y" * 300 + "\x1b[0m"


def test_text_cannot_take_over_the_terminal() -> None:
    terminal = screen()
    terminal.write("\x1b]0;title\x07\r\x9b2J")
    assert written(terminal) == "␛]0;title␇␍\N{REPLACEMENT CHARACTER}2J"


def test_a_pipe_gets_exactly_the_text() -> None:
    terminal = Terminal(Console(file=io.StringIO(), force_terminal=False), Console(file=io.StringIO()))
    terminal.write("\x1b\r\n", DRAFTED)
    assert written(terminal) == "\x1b\r\n"


def test_no_color_in_the_environment_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert screen().colored
    assert not screen(no_color=True).colored
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = screen()
    terminal.write("x", DRAFTED)
    assert not terminal.colored
    assert written(terminal) == "x"


def test_ctrl_c_keeps_the_coloured_text_and_closes_the_answer(llm: LLM) -> None:
    with PtyProcess("generate", PROMPT, "--max-tokens", "400", "--ignore-eos", *SETTLED) as terminal:
        terminal.wait_for(GREEN)
        terminal.wait_for(BOLD_YELLOW)
        terminal.type("\x03")
        assert terminal.wait() == 130
    closing = re.search(r"interrupted · (\d+) tokens .* tok/s", terminal.output)
    assert closing is not None
    tokens = int(closing[1])
    assert 0 < tokens < 400
    wanted = llm.generate(PROMPT, SamplingParams(max_tokens=tokens, ignore_eos=True))[0].outputs[0].text
    assert wanted in ESCAPE.sub("", terminal.output.replace("^C", ""))  # which may be echoed inside an escape sequence
    assert "target's own" in terminal.output  # the legend
    assert "Traceback" not in terminal.output

"""``pearl generate`` on a terminal: colours, and Ctrl-C."""

from __future__ import annotations

import re

from cli_pty import PtyProcess
from cli_support import PROMPT, SETTLED

from pearl import LLM, SamplingParams

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
DRAFTED, OWN = "\x1b[32m", "\x1b[1;33m"


def test_colours_tell_drafted_tokens_from_the_target_s_own(llm: LLM) -> None:
    with PtyProcess("generate", PROMPT, "--max-tokens", "32", *SETTLED) as terminal:
        assert terminal.wait() == 0
    wanted = llm.generate(PROMPT, SamplingParams(max_tokens=32))[0].outputs[0]
    assert wanted.text in ESCAPE.sub("", terminal.output)
    assert DRAFTED in terminal.output
    assert OWN in terminal.output
    assert "tok/s" in terminal.output
    assert "target's own" in terminal.output  # the legend


def test_no_color_in_the_environment_is_honoured() -> None:
    with PtyProcess("generate", PROMPT, "--max-tokens", "8", *SETTLED, environment={"NO_COLOR": "1"}) as terminal:
        assert terminal.wait() == 0
    assert DRAFTED not in terminal.output
    assert OWN not in terminal.output
    assert "target's own" not in terminal.output


def test_ctrl_c_keeps_the_text_and_closes_the_answer() -> None:
    with PtyProcess("generate", PROMPT, "--max-tokens", "400", "--ignore-eos", *SETTLED) as terminal:
        terminal.wait_for(DRAFTED)
        terminal.type("\x03")
        assert terminal.wait() == 130
    written = re.search(r"interrupted · (\d+) tokens", terminal.output)
    assert written is not None
    assert 0 < int(written[1]) < 400
    assert "Traceback" not in terminal.output

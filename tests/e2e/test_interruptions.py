"""Ctrl-C at any line: it takes effect between rounds, leaves the LLM usable, and costs no other call a token."""

from __future__ import annotations

import contextlib
import gc
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from e2e_support import Pair, assert_at_rest, prompts, token_ids

import pearl
from pearl import LLM, SamplingParams

OpenLLM = Callable[..., LLM]
LIBRARY = str(Path(pearl.__file__).parent)
TOKENS = 4
PARAMS = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
EVERY = 83  # lines: a sample; with 1 all of them, which takes minutes


@contextmanager
def ctrl_c_at_line(number: int, where: Sequence[str] = (LIBRARY,), returns: bool = False) -> Iterator[list[int]]:
    """The signal arrives when files that begin with ``where`` execute their ``number``-th line, or also leave a
    function; yields the count so far.
    """
    count = [0]

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(tuple(where)):
            return None
        if event == "line" or (returns and event == "return"):
            count[0] += 1
            if count[0] == number:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(before)


def lines_of(call: Callable[[], object]) -> int:
    call()  # the first one does more
    with ctrl_c_at_line(-1) as count:
        call()
    return count[0]


def interrupted(call: Callable[[], object], line: int) -> None:
    """KeyboardInterrupt must come out, wherever it went in."""
    with pytest.raises(KeyboardInterrupt), ctrl_c_at_line(line):
        call()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("lanes", [1, 3])
def test_ctrl_c_at_any_line_of_generate(llama: Pair, open_llm: OpenLLM, lanes: int) -> None:
    batch = prompts((5, 30), seed=61)
    expected = [llama.greedy(prompt, TOKENS) for prompt in batch]
    llm = open_llm(llama, window=2, max_num_seqs=lanes, max_num_batched_tokens=16)

    def call() -> None:
        llm.generate(batch, PARAMS, on_output=lambda delta: None)

    for line in range(lanes, lines_of(call), EVERY):
        interrupted(call, line)
        assert_at_rest(llm)
        assert token_ids(llm.generate(batch[:1], PARAMS)) == expected[:1]
    assert token_ids(llm.generate(batch, PARAMS)) == expected


def test_ctrl_c_around_a_callback(llama: Pair, open_llm: OpenLLM) -> None:
    """Wherever the callback's turn begins and ends, the context managers of Python's own library among it; of their
    lines every third.
    """
    prompt = prompts([5], seed=61)[0]
    llm = open_llm(llama, window=2)
    places = [LIBRARY + "/" + name for name in ("gate.py", "interrupts.py")] + [contextlib.__file__]

    def call() -> None:
        llm.generate(prompt, PARAMS, on_output=lambda delta: None)

    call()
    with ctrl_c_at_line(-1, places, returns=True) as count:
        call()
    for line in range(1, count[0] + 1, 3):
        with contextlib.suppress(KeyboardInterrupt), ctrl_c_at_line(line, places, returns=True):
            call()
        gc.collect()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert token_ids(llm.generate(prompt, PARAMS)) == [llama.greedy(prompt, TOKENS)]
    assert_at_rest(llm)


def test_ctrl_c_at_any_line_of_a_stream_leaves_another_whole(llama: Pair, open_llm: OpenLLM) -> None:
    """What one call is interrupted in, the other's tokens among it, reaches the other."""
    mine, other = prompts((7, 12), seed=62)
    llm = open_llm(llama, window=2)

    def call() -> None:
        with llm.stream(mine, PARAMS) as stream:
            for _ in stream:
                pass

    for line in range(1, lines_of(call), EVERY):
        stream = llm.stream(other, PARAMS)
        tokens = list(next(stream).token_ids)
        interrupted(call, line)
        tokens += [token for chunk in stream for token in chunk.token_ids]
        assert tokens == llama.greedy(other, TOKENS)
        assert_at_rest(llm)


def test_ctrl_c_at_any_line_of_close(llama: Pair) -> None:
    for line in range(1, 200, 1 + EVERY // 10):
        llm = llama.llm(window=2)
        stream = llm.stream([5, 6], PARAMS)
        next(stream)
        try:
            with ctrl_c_at_line(line) as count:
                llm.close()
        except KeyboardInterrupt:
            llm.close()
        assert_at_rest(llm)
        assert [chunk.finish_reason for chunk in stream] == ["abort"]
        if count[0] < line:
            return
    raise AssertionError("close has more lines than this test expects")

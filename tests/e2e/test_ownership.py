"""One LLM, several threads, forked processes, calls that fail: nothing costs another call its tokens."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Collection

import pytest
from e2e_support import Pair, assert_at_rest, prompts, token_ids

from pearl import LLM, EngineInUseError, SamplingParams
from pearl.engine.rounds import RoundRecord
from pearl.outputs import OutputDelta

OpenLLM = Callable[..., LLM]
TOKENS = 12
PARAMS = SamplingParams(max_tokens=TOKENS, ignore_eos=True)


def text_fails_for(llm: LLM, monkeypatch: pytest.MonkeyPatch, tokens: list[int], after: int) -> None:
    """Outputs of the prompt ``tokens`` cannot be made after that many verdicts."""
    right = type(llm.tokenizer).detokenizer

    def detokenizer(tokenizer: object, prompt: list[int], shown: Collection[int] = ()) -> object:
        made = right(tokenizer, prompt, shown)  # type: ignore[arg-type]
        feed, calls = made.feed, []

        def failing(token: int) -> str:
            calls.append(token)
            if prompt == tokens and len(calls) > after:
                raise TypeError("no such text")
            return feed(token)

        made.feed = failing  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(type(llm.tokenizer), "detokenizer", detokenizer)


@pytest.mark.parametrize("after", [0, 3])
def test_an_output_that_fails_ends_its_request_alone(
    llama: Pair, open_llm: OpenLLM, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    failing, healthy, streamed = prompts((6, 9, 14), seed=71)
    llm = open_llm(llama, window=3)
    text_fails_for(llm, monkeypatch, failing, after)
    stream = llm.stream(streamed, PARAMS)
    tokens = list(next(stream).token_ids)
    bad, good = llm.generate([failing, healthy], PARAMS)
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert (bad.outputs[0].finish_reason, bad.outputs[0].error) == ("abort", "TypeError: no such text")
    assert bad.outputs[0].token_ids == llama.greedy(failing, TOKENS)[: len(bad.outputs[0].token_ids)]
    assert token_ids([good]) == [llama.greedy(healthy, TOKENS)]
    assert tokens == llama.greedy(streamed, TOKENS)
    assert_at_rest(llm)


@pytest.mark.parametrize("times", [2, TOKENS])
def test_what_an_observer_raises_costs_no_other_call_a_token(llama: Pair, open_llm: OpenLLM, times: int) -> None:
    """The other call's last ones neither, which no later round would bring."""
    mine, other = prompts((8, 11), seed=72)
    raises: list[bool] = []

    def observer(record: RoundRecord) -> None:
        if raises:
            raise RuntimeError("the observer fell asleep")

    llm = open_llm(llama, window=3, observer=observer)
    stream = llm.stream(other, PARAMS)
    tokens = list(next(stream).token_ids)
    raises.append(True)
    for _ in range(times):
        with pytest.raises(RuntimeError, match="fell asleep"):
            llm.generate(mine, PARAMS)
    raises.clear()
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert tokens == llama.greedy(other, TOKENS)
    assert_at_rest(llm)


def test_a_stream_of_a_closed_llm_ends_with_the_reason(llama: Pair) -> None:
    llm = llama.llm(window=2)
    stream = llm.stream([5, 6, 7], SamplingParams(max_tokens=2 * TOKENS, ignore_eos=True, n=2, temperature=1.0, seed=1))
    next(stream)
    llm.close()
    last = {chunk.index: chunk for chunk in stream}
    assert [(last[i].finish_reason, last[i].error) for i in (0, 1)] == [
        ("abort", "the engine was closed before this output had ended")
    ] * 2
    assert list(stream) == []


def test_closing_within_a_callback_ends_the_call(llama: Pair) -> None:
    llm = llama.llm(window=2)
    output = llm.generate([5, 6, 7], PARAMS, on_output=lambda delta: llm.close())[0].outputs[0]
    assert output.finish_reason == "abort"
    assert output.error is not None
    assert "closed" in output.error
    assert output.token_ids == llama.greedy([5, 6, 7], TOKENS)[: len(output.token_ids)]


def test_a_second_thread_is_refused_and_changes_nothing(llama: Pair, open_llm: OpenLLM) -> None:
    """While a round is under way; between rounds, in the callback, the other thread may come first."""
    first, second = prompts((10, 13), seed=73)
    inside, tried = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def observer(record: RoundRecord) -> None:
        inside.set()
        assert tried.wait(60)

    llm = open_llm(llama, window=3, observer=observer)
    stream = llm.stream(second, PARAMS)

    def intrude() -> None:
        assert inside.wait(60)
        for call in (lambda: llm.generate(second, PARAMS), lambda: next(stream), llm.close):
            try:
                call()
            except EngineInUseError as error:
                errors.append(error)
        tried.set()

    thread = threading.Thread(target=intrude)
    thread.start()
    outputs = llm.generate(first, PARAMS)
    thread.join(60)
    assert [str(error).startswith("this LLM is in use by thread 'MainThread'") for error in errors] == [True] * 3
    assert token_ids(outputs) == [llama.greedy(first, TOKENS)]
    assert [token for chunk in stream for token in chunk.token_ids] == llama.greedy(second, TOKENS)
    assert_at_rest(llm)


def test_an_observer_may_not_use_the_llm_a_callback_may(llama: Pair, open_llm: OpenLLM) -> None:
    mine, nested = prompts((7, 9), seed=74)
    refused: list[EngineInUseError] = []
    outputs: list[list[list[int]]] = []

    def observer(record: RoundRecord) -> None:
        try:
            llm.generate(nested, PARAMS)
        except EngineInUseError as error:
            refused.append(error)

    def callback(delta: OutputDelta) -> None:
        if not outputs:
            outputs.append(token_ids(llm.generate(nested, PARAMS)))

    llm = open_llm(llama, window=3, observer=observer)
    assert token_ids(llm.generate(mine, PARAMS, callback)) == [llama.greedy(mine, TOKENS)]
    assert outputs == [[llama.greedy(nested, TOKENS)]]
    assert refused
    assert_at_rest(llm)


def test_what_a_callback_raises_comes_out_though_another_thread_came_first(llama: Pair, open_llm: OpenLLM) -> None:
    mine, other = prompts((7, 9), seed=76)
    inside, done = threading.Event(), threading.Event()
    others: list[list[list[int]]] = []

    def observer(record: RoundRecord) -> None:
        if threading.current_thread() is thread:
            inside.set()
            assert done.wait(60)

    def callback(delta: OutputDelta) -> None:
        thread.start()
        assert inside.wait(60)
        raise KeyboardInterrupt

    llm = open_llm(llama, window=3, observer=observer)
    thread = threading.Thread(target=lambda: others.append(token_ids(llm.generate(other, PARAMS))))
    try:
        with pytest.raises(KeyboardInterrupt):
            llm.generate(mine, PARAMS, callback)
    finally:
        done.set()
    thread.join(60)
    assert others == [[llama.greedy(other, TOKENS)]]
    assert token_ids(llm.generate(mine, PARAMS)) == [llama.greedy(mine, TOKENS)]
    assert_at_rest(llm)


def test_threads_may_take_turns(llama: Pair, open_llm: OpenLLM) -> None:
    prompt = prompts([10], seed=75)[0]
    llm = open_llm(llama, window=3)
    stream = llm.stream(prompt, PARAMS)
    tokens = list(next(stream).token_ids)
    others: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: others.append(token_ids(llm.generate(prompt, PARAMS))))
    thread.start()
    thread.join(60)
    tokens += [token for chunk in stream for token in chunk.token_ids]
    assert [tokens] == others[0] == [llama.greedy(prompt, TOKENS)]


FORKED = """
import os, sys
from pearl import LLM, PearlError, SamplingParams

params = SamplingParams(max_tokens=8, ignore_eos=True)
llm = LLM(draft_threads=2, target_threads=2, window=3)
stream = llm.stream("b", params)
next(stream)
child = os.fork()
if child == 0:
    for call in (lambda: llm.generate("x", params), lambda: next(stream)):
        try:
            call()
        except PearlError as error:
            print(type(error).__name__, flush=True)
    llm.close()
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), sum(len(chunk.token_ids) for chunk in stream) > 0)
llm.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_forked_process_is_refused_and_ends() -> None:
    """Its threads, the helpers of a forward among them, are the parent's; waiting for one would last for ever."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.split(), done.returncode) == (["EngineClosedError", "EngineClosedError", "7", "True"], 0)

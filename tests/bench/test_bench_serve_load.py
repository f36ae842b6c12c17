"""``bench/serve_load.py`` and ``bench/serve_soak.py``: real servers, clients whose answers are known, and servers that
err."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bench_support import Finished, run_script

from bench.serving_load import checked_server, program, soak
from bench.serving_load.client import Connection, Reply
from bench.serving_load.closed_loop import Seen, closed_loop
from bench.serving_load.questions import Question, is_right
from bench.shared.server import Server
from pearl import LLM

SCRIPT = "serve_load.py"
Script = Callable[..., Finished]
SETTLED = "--dtype float32 --max-model-len 256 --draft-threads 1 --target-threads 1"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
QUESTION = Question.of(0, "x", 3)


def told(data: str) -> bytes:
    """An event, as a chunk of a body."""
    return f"{len(data) + 8:x}\r\ndata: {data}\n\n\r\n".encode()


def event(*tokens: int) -> bytes:
    return told(json.dumps({"choices": [{"token_ids": tokens}]}))


END = b"0\r\n\r\n"
DONE = told("[DONE]") + END


def against(answer: Sequence[bytes], ask: Callable[[Server], Any], pause: float = 0.0) -> Any:
    """What ``ask`` returns of a server that gives everyone the bytes of ``answer``, ``pause`` seconds apart."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in answer:
            writer.write(piece)
            await asyncio.sleep(pause)
        writer.close()

    async def run() -> Any:
        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with listening:
            host, port = listening.sockets[0].getsockname()
            return await ask(Server(SimpleNamespace(pid=0), host, port, deque()))  # type: ignore[arg-type]

    return asyncio.run(asyncio.wait_for(run(), 30))


def reply_of(*answer: bytes, leave_after: int | None = None) -> Reply:
    async def ask(server: Server) -> Reply:
        return await Connection(server.host, server.port).ask("/x", {}, leave_after)

    reply: Reply = against(answer, ask)
    return reply


def test_events_are_read_however_they_are_cut() -> None:
    whole = HEAD + event(1, 2) + event(3) + DONE
    for at in (10, len(HEAD), len(HEAD) + 5, len(whole) - 3):
        reply = reply_of(whole[:at], whole[at:])
        assert [tokens for _, tokens in reply.pieces()] == [[1, 2], [3]]
        assert reply.done
        assert reply.error is None


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (HEAD + event(1) + END, "without [DONE]"),
        (b"HTTP/1.1 429 No\r\ncontent-length: 2\r\n\r\n{}", "status 429: {}"),
        (HEAD + told('{"error":{"message":"no"}}') + DONE, '"no"'),
        (b"", "the connection broke"),
    ],
)
def test_what_is_wrong_with_an_answer_is_said(answer: bytes, words: str) -> None:
    assert words in str(reply_of(answer).error)


def test_who_leaves_has_the_beginning() -> None:
    reply = reply_of(HEAD + event(1), event(2), event(3) + DONE, leave_after=1)
    assert reply.left
    assert reply.error is None
    assert is_right(reply, [1, 2, 3])
    assert not is_right(reply, [2, 1, 3])


def test_an_answer_that_ends_too_early_is_wrong() -> None:
    assert not is_right(reply_of(HEAD + event(1) + DONE), [1, 2])


def seen(*answer: bytes, pause: float = 0.0) -> Seen:
    found: Seen = against(
        answer, lambda server: closed_loop(server, [QUESTION], {0: [1, 2, 3]}, 2, 0.5, 0.1, lambda: False), pause
    )
    return found


def test_clients_count_tokens_and_time() -> None:
    right = seen(HEAD + event(1), event(2, 3) + DONE, pause=0.02)
    assert right.wrong == 0
    assert not right.errors
    assert right.requests
    assert 2.5 * right.requests < right.tokens < 3.5 * (right.requests + 2)
    assert min(right.gaps) > 0.015
    # Of nearly the same requests: a gap is counted if it lies in the time, a pace if its request ended in it.
    assert statistics.median(right.paces) == pytest.approx(statistics.median(right.gaps) / 2, rel=0.25)
    assert right.seconds > 0.4


def test_clients_notice_what_is_not_right() -> None:
    assert seen(HEAD + event(1) + event(2, 4) + DONE).wrong > 0
    assert "without [DONE]" in seen(HEAD + event(1) + END).errors[0]


def test_the_report_has_every_cell(script: Script, tmp_path: Path) -> None:
    out, picture = tmp_path / "load.json", tmp_path / "load.svg"
    finished = script(
        "--methods", "autoregressive,pearl@3", "--clients", "1,3", "--seconds", "0.6", "--warm-up", "0.2",
        "--repeats", "1", "--prompts", "2", "--max-tokens", "12", "--options", SETTLED, "--json", str(out),
        "--plot", str(picture),
    )  # fmt: skip
    assert finished.code == 0, finished.err
    assert "every answer was the reference's" in finished.out
    report = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "settings"} <= report.keys()
    assert report["complete"]
    cells = {(cell["contender"], cell["clients"]): cell for cell in report["results"]}
    assert len(cells) == len(report["results"]) == 4
    for cell in cells.values():
        assert cell["tok_s"] > cell["requests_s"] > 0
        assert cell["first"]["p50"] <= cell["first"]["p99"]
        assert not cell["wrong"]
        assert 0 < cell["client_busy"] < 1.5
    assert picture.stat().st_size > 1000


def test_answers_that_differ_from_the_first_methods_end_in_failure(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Seen(0.5, 1, 10, [0.1], [0.1], [0.1], wrong=1)
    monkeypatch.setattr(program.Contest, "run", lambda *_: iter([("autoregressive", 1, wrong)]))
    finished = script("--clients", "1")
    assert finished.code == 1
    assert "wrong answers" in finished.err


def test_what_was_measured_before_an_interruption_is_kept(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(contest: program.Contest, *_: object) -> Iterator[tuple[str, int, Seen]]:
        yield "pearl", 4, Seen(0.5, 1, 10, [0.1], [0.1], [0.1])
        os.kill(os.getpid(), signal.SIGINT)
        assert contest.stopped()

    monkeypatch.setattr(program.Contest, "run", run)
    out = tmp_path / "load.json"
    assert script("--json", str(out)).code == 130
    report = json.loads(out.read_text())
    assert [cell["tok_s"] for cell in report["results"]] == [20.0]
    assert not report["complete"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "nope"), "nope"),
        (("--clients", "0"), "--clients takes integers >= 1"),
        (("--methods", "pearl@4+2"), "no option for prepared windows"),
        (("--json", "/nowhere/at/all.json"), "--json"),
    ],
)
def test_wrong_options_are_refused_before_a_server_starts(
    arguments: tuple[str, ...], message: str, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "server", lambda *_: pytest.fail("a server was started"))
    finished = script(*arguments)
    assert finished.code == 2
    assert message in finished.err


def test_a_soak_of_a_second_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "soak.json"
    finished = run_script(
        "serve_soak.py", "--clients", "12", "--seconds", "2", "--abort", "0.4", "--prompts", "2", "--max-tokens", "16",
        "--options", f"{SETTLED} --max-num-seqs 4 --max-waiting 4", "--json", str(out),
        monkeypatch=monkeypatch, capsys=capsys,
    )  # fmt: skip
    report = json.loads(out.read_text())
    growth = [failure for failure in report["failures"] if "memory grew" in failure]  # of a server that has just begun
    assert report["failures"] == growth
    assert finished.code == (1 if growth else 0)
    assert min(report["finished"], report["left"], report["refused"], report["tokens"]) > 0
    assert not report["wrong"]


def tally(**changes: Any) -> soak.Tally:
    return soak.Tally(**{"finished": 5, "resident": [100.0] * 8} | changes)


@pytest.mark.parametrize(
    ("changes", "gauges", "books", "status", "words"),
    [
        ({}, {}, "intact", 0, None),
        ({"errors": Counter({"no": 2})}, {}, "intact", 0, "errors"),
        ({"wrong": 1}, {}, "intact", 0, "1 answers"),
        ({"finished": 0}, {}, "intact", 0, "no answer"),
        ({"resident": [100.0] * 6 + [120.0] * 2}, {}, "intact", 0, "memory grew from 100 to 120"),
        ({}, {"vllm:num_requests_running": 1.0}, "intact", 0, "the server still has"),
        ({}, {}, "2 of 9 pages of the target are held", 0, "2 of 9 pages"),
        ({}, {}, "intact", 1, "status 1"),
    ],
)
def test_a_soak_fails_for_each_of_its_reasons(
    changes: dict[str, Any], gauges: dict[str, float], books: str, status: int, words: str | None
) -> None:
    failures = list(soak._failures(tally(**changes), gauges, f"{checked_server.PAGES} {books}\n", status))
    assert len(failures) == (words is not None)
    assert words is None or words in failures[0]


def test_pages_that_nobody_frees_are_found() -> None:
    with LLM(dtype="float32", max_model_len=64, max_num_seqs=2) as llm:
        assert checked_server.pages_of(llm) == checked_server.INTACT
        kv = llm.engine.scheduler.target_kv
        kv.begin(99, [1, 2, 3])
        kv.reserve(99, 3, 0)
        assert "pages of the target are held" in checked_server.pages_of(llm)
        kv._pool._refcounts[kv.block_table(99)[0]] += 1
        assert "bookkeeping" in checked_server.pages_of(llm)

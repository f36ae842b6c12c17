"""``pearl serve`` as a process: how it starts, and how signals end it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util

import httpx
import pytest
from cli_pty import ROOT
from cli_support import SETTLED
from typer.testing import CliRunner

from pearl.cli.app import application, run

_PATIENCE = 60.0
BODY = {"prompt": "def f(x):\n", "temperature": 0, "ignore_eos": True}


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(the process, its URL)"""
    line = [sys.executable, "-m", "pearl.cli", "serve", "--port", "0", *SETTLED, *arguments]
    names = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    with subprocess.Popen(line, env=names, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        reader = threading.Timer(_PATIENCE, process.kill)
        reader.start()
        try:
            said = []
            for words in process.stderr:
                said.append(words)
                if found := re.search(r"listening on (http://\S+),", words):
                    break
            else:
                pytest.fail("".join(said))
            yield process, found[1]
        finally:
            reader.cancel()
            if process.poll() is None:
                process.kill()


def test_the_first_signal_finishes_what_runs() -> None:
    with serving("--served-model-name", "mine", PEARL_API_KEY="k") as (process, url):
        with httpx.Client(base_url=url, headers={"authorization": "Bearer k"}, timeout=_PATIENCE) as client:
            assert httpx.get(f"{url}/v1/models").status_code == 401
            assert client.get("/v1/models").json()["data"][0]["id"] == "mine"
            body = BODY | {"max_tokens": 450, "stream": True, "stream_options": {"include_usage": True}}
            with client.stream("POST", "/v1/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                refused = wait_for_refusal(url)
                rest = [line for line in lines if line]
            assert refused.json()["error"]["code"] == "draining"
            assert refused.headers["retry-after"]
            assert '"completion_tokens":450' in rest[-2]
            assert rest[-1] == "data: [DONE]"
        assert process.wait(_PATIENCE) == 0


def wait_for_refusal(url: str) -> httpx.Response:
    while True:
        response = httpx.post(
            f"{url}/v1/completions", json=BODY | {"max_tokens": 1}, headers={"authorization": "Bearer k"}
        )
        if response.status_code == 503:
            return response


def test_the_second_signal_ends_at_once() -> None:
    body = BODY | {"max_tokens": 450, "stream": True, "n": 16}
    with serving() as (process, url), httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        lines = response.iter_lines()  # whose end closes the connection
        assert next(lines)
        process.send_signal(signal.SIGINT)
        while httpx.get(f"{url}/health").status_code != 503:
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait(_PATIENCE) == -signal.SIGTERM


def test_what_the_drain_timeout_does_not_suffice_for_is_told_so() -> None:
    body = BODY | {"max_tokens": 450, "stream": True, "n": 16}
    with (
        serving("--drain-timeout", "0") as (process, url),
        httpx.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        assert next(lines)
        process.send_signal(signal.SIGTERM)
        *_, error, done = [line for line in lines if line]
        assert "the engine was closed before this output had ended" in error
        assert done == "data: [DONE]"
        assert process.wait(_PATIENCE) == 0


def test_a_server_that_is_killed_breaks_its_connections_and_another_takes_its_port() -> None:
    body = BODY | {"max_tokens": 450, "stream": True, "n": 16}
    with serving() as (process, url), httpx.stream("POST", f"{url}/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines)
        process.kill()
        with pytest.raises(httpx.TransportError):  # which nobody can take for the end of an answer
            list(lines)
        assert process.wait(_PATIENCE) == -signal.SIGKILL
    with serving("--port", url.rpartition(":")[2]) as (_, again):
        assert again == url
        assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=_PATIENCE).status_code == 200


def test_a_port_in_use_is_told_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", "--port", str(taken.getsockname()[1]), "--target", "/no/such/model"]) == 2
    assert "cannot listen at 127.0.0.1:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--api-key", " "], "API key"),
        (["--max-body", "much"], "a size is"),
        (["--generation-config", "mine"], "'mine' is not one of"),
        (["--host", "no such host."], "no address"),
        (["--port", "99999"], "port"),
        (["--port", "0", "--max-waiting", "0"], "max_waiting"),
    ],
)
def test_refusals(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_extra_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find(name, *rest))
    assert run(["serve"]) == 2
    assert "pearl serve needs uvicorn: pip install 'pearl-engine[serve]'" in " ".join(capsys.readouterr().err.split())


def test_help_does_not_show_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEARL_API_KEY", "s3cret")
    assert "s3cret" not in CliRunner().invoke(application(), ["serve", "--help"]).output

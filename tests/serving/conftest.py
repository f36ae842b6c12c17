"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from serving_support import OPTIONS, LiveServer, live_server

from pearl import LLM


@pytest.fixture(scope="session")
def idle_llm() -> Iterator[LLM]:
    """For servers around a fake engine, which need its tokenizer and limits."""
    with LLM(dtype="float32", max_model_len=256, max_num_seqs=2, method="autoregressive") as llm:
        yield llm


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """Of the bundled pair. A file that needs another has a fixture of this name; the client is that one's."""
    with live_server() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The library, with the server's options."""
    with LLM(**OPTIONS) as loaded:
        yield loaded

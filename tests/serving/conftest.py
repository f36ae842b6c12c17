"""Fixtures of the server's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pearl import LLM


@pytest.fixture(scope="session")
def idle_llm() -> Iterator[LLM]:
    """For servers around a fake engine, which need its tokenizer and limits."""
    with LLM(dtype="float32", max_model_len=256, max_num_seqs=2, method="autoregressive") as llm:
        yield llm

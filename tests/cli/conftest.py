"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pearl import LLM


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The library itself, configured as ``cli_support.SETTLED`` configures the command."""
    with LLM(dtype="float32", window=3, max_model_len=512, max_num_seqs=2) as loaded:
        yield loaded

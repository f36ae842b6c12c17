"""From options to a loaded ``LLM``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pearl.cli.options import EngineOptions
from pearl.cli.terminal import Terminal
from pearl.llm import LLM


@contextmanager
def loaded(options: EngineOptions, terminal: Terminal, max_num_seqs: int = 1) -> Iterator[LLM]:
    """The LLM, with a spinner while it loads; closed at the end. Raises ConfigurationError as ``LLM`` does."""
    keywords = options.keywords()
    with terminal.busy("loading the models"):
        # For one conversation most shapes never come up: those that do are captured then.
        llm = LLM(**keywords, max_num_seqs=max_num_seqs, capture_seconds=0)
    with llm:
        yield llm

"""Benchmarks as their users start them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from bench_support import Finished, run_script


@pytest.fixture
def script(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Finished]:
    """``script(*arguments)``: the file in bench/ that the test module names in SCRIPT."""
    return partial(run_script, request.module.SCRIPT, monkeypatch=monkeypatch, capsys=capsys)

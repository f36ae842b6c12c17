"""A pytest plugin of the GPU suite: what runs after a test that broke the process's CUDA context is skipped.

After an illegal access every later call fails. Without this the first failure, which is the one to look at, lies among
dozens that say nothing; with it each process reports one. Sets nothing up where torch was not imported.
"""

from __future__ import annotations

import sys

import pytest


class BrokenContext:
    """Waits for the GPU after each test, so that an error belongs to the test whose kernel it was."""

    def __init__(self) -> None:
        self.culprit = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.culprit:
            pytest.skip(f"the CUDA context of this process was broken by {self.culprit}")

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        if self.culprit or cuda is None or not cuda.is_initialized():
            return
        try:
            cuda.synchronize()
        except RuntimeError:
            self.culprit = item.nodeid
            raise


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(BrokenContext(), "broken CUDA context")

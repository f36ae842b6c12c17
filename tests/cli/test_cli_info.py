"""``pearl --version`` and ``pearl info``."""

from __future__ import annotations

from typer.testing import CliRunner

from pearl.cli.app import application
from pearl_kernels.registry import OPERATORS


def test_version() -> None:
    result = CliRunner().invoke(application(), ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("pearl ")


def test_info_names_every_operator_and_every_reason() -> None:
    result = CliRunner().invoke(application(), ["info", "--device", "cpu"], env={"COLUMNS": "160"})
    assert result.exit_code == 0
    for part in ("torch", "threads", "MB resident, without a model", "target on cpu", "reference", *OPERATORS):
        assert part in result.stdout

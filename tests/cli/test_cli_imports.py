"""What a command imports, in a process of its own: imports are most of the time until the first token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_pty import ROOT
from cli_support import PROMPT, SETTLED

# Runs a command line and writes down what was imported.
PROGRAM = """
import json, pathlib, sys
from pearl.cli.app import run
code = run(sys.argv[2:])
pathlib.Path(sys.argv[1]).write_text(json.dumps([code, sorted(sys.modules)]))
"""


def imported(arguments: list[str], note: Path) -> tuple[int, set[str]]:
    """(exit code, modules)"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", PROGRAM, str(note), *arguments]
    subprocess.run(line, env=environment, capture_output=True, check=True, timeout=120)
    code, modules = json.loads(note.read_text())
    return code, set(modules)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["generate", "--help"], 0),
        (["chat", "--no-such-option"], 2),
        (["generate", "x", "--temperature", "-1"], 2),
        (["bench", "--help"], 0),
        (["serve", "--help"], 0),
        (["serve", "--max-body", "much"], 2),
        (["bench", "--shapes", "8b:9b"], 2),
        (["info", "--head-dim", "0"], 2),
    ],
)
def test_help_and_refusals_wait_for_no_model_code(arguments: list[str], code: int, tmp_path: Path) -> None:
    exit_code, modules = imported(arguments, tmp_path / "modules.json")
    assert exit_code == code
    assert not modules & {"torch", "transformers", "tokenizers", "numpy", "huggingface_hub", "pearl.llm"}


def test_what_is_imported_later_is_listed_at_once() -> None:
    program = "import sys, pearl; sys.exit(not set(pearl.__all__) <= set(dir(pearl)) or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0


HEAVY = {
    "transformers", "huggingface_hub", "sympy", "torch.distributed.tensor", "triton", "PIL", "matplotlib", "scipy",
    "flash_attn", "flashinfer", "datasets", "pearl.bench", "pearl_kernels.report",
}  # fmt: skip


def test_generating_imports_what_it_works_with(tmp_path: Path) -> None:
    """With the bundled pair; other models' configurations and tokenizers are transformers'."""
    exit_code, modules = imported(["generate", PROMPT, "--max-tokens", "1", *SETTLED], tmp_path / "modules.json")
    assert exit_code == 0
    assert "torch" in modules
    assert sorted(modules & HEAVY) == []

"""The files of bench/ that start a folder's program: from anywhere, though bench is not installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench_support import ROOT


@pytest.mark.parametrize(
    "name",
    [
        "latency.py",
        "host_cost.py",
        "cpu_roofline.py",
        "serve_load.py",
        "serve_soak.py",
        "serving_clients.py",
        "train_pair.py",
        "suite.py",
    ],
)
def test_a_program_finds_its_folder_from_anywhere(tmp_path: Path, name: str) -> None:
    """In a checkout whose programs do nothing but tell that they started."""
    checkout = tmp_path / "checkout"
    (checkout / "bench").mkdir(parents=True)
    shutil.copy(ROOT / "bench" / name, checkout / "bench" / name)
    found = re.search(r"^from (bench\..+) import main$", (ROOT / "bench" / name).read_text("utf-8"), re.MULTILINE)
    assert found is not None
    program = (checkout / found[1].replace(".", "/")).with_suffix(".py")
    assert (ROOT / program.relative_to(checkout)).exists()
    program.parent.mkdir()
    program.write_text("def main() -> None:\n    print('it started')\n")
    for folder in (checkout / "bench", program.parent):
        (folder / "__init__.py").touch()
    (tmp_path / "elsewhere").mkdir()
    # Without site-packages, whose .pth file of an editable install would find this checkout's bench first.
    (tmp_path / "typer.py").write_text("def run(main):\n    main()\n")
    line = [sys.executable, "-S", str(checkout / "bench" / name)]
    shown = subprocess.run(
        line,
        cwd=tmp_path / "elsewhere",
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (shown.stdout, shown.stderr) == ("it started\n", "")

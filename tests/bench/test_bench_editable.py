"""``pip install -e ./pearl`` must work whatever the checkout is called, and from wherever Python is started."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from bench_support import ROOT

# Makes what the real one makes, empty: the native module in the folder that setup.py names.
CMAKE = """#!/bin/sh
for argument; do
  case "$argument" in -DPEARL_OUTPUT_DIR=*) out="${argument#*=}"; mkdir -p "$out/cpu"; : > "$out/cpu/_core%s" ;; esac
done
"""


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkout called ``pearl``, and what its editable install puts into ``site-packages``."""
    folder = tmp_path_factory.mktemp("parent")
    checkout, tools = folder / "pearl", folder / "tools"
    for package in ("pearl", "pearl_kernels", "pearl_kernels/cpu"):  # as many modules as the question needs
        (checkout / package).mkdir(parents=True)
        for module in (ROOT / package).glob("*.py"):
            shutil.copy(module, checkout / package)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    tools.mkdir()
    (tools / "cmake").write_text(CMAKE % sysconfig.get_config_var("EXT_SUFFIX"))
    (tools / "cmake").chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "PEARL_CUDA"} | {"PATH": f"{tools}:/usr/bin:/bin"}
    program = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    line = [sys.executable, "-W", "ignore", "-c", program, str(folder)]
    subprocess.run(line, cwd=checkout, env=environment, capture_output=True, check=True, timeout=60)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(folder / "site-packages")
    return folder


@pytest.mark.parametrize("start", ["", "pearl", "tools"])
def test_the_package_is_found_from_everywhere(parent: Path, start: str) -> None:
    """From the parent folder ./pearl is a folder without __init__.py that must not pass for the package."""
    program = (
        f"import site; site.addsitedir({str(parent / 'site-packages')!r});"
        "import pearl; from pearl import PearlError; print(pearl.__file__)"
    )
    line = [sys.executable, "-S", "-c", program]  # -S: nothing of this environment is on the path
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    finished = subprocess.run(line, cwd=parent / start, env=environment, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert Path(finished.stdout.strip()) == parent / "pearl" / "pearl" / "__init__.py"


def test_the_native_module_is_built_into_the_checkout(parent: Path) -> None:
    assert len(list((parent / "pearl" / "pearl_kernels" / "cpu").glob("_core.*.so"))) == 1

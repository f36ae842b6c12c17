"""The command line is tested with the bundled pair; float32 and a fixed window make every run the same."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from typer.testing import CliRunner, Result

from pearl.cli.app import application

PROMPT = "def read_lines(path):\n"
SETTLED = ("--dtype", "float32", "--window", "3", "--max-model-len", "512")


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    """Run ``pearl generate`` in this process, with neither stream a terminal."""
    return CliRunner().invoke(application(), ["generate", *SETTLED, *arguments], input=stdin, catch_exceptions=False)


def write_wheel(folder: Path, requirement: str, files: Mapping[str, bytes]) -> Path:
    """A package ``name==version`` as pip takes it, with these files."""
    name, version = requirement.replace("-", "_").split("==")
    info = f"{name}-{version}.dist-info"
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    described = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in {**files, **described}.items():
            archive.writestr(path, data)
    return wheel

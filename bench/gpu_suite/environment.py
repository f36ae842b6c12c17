"""What the machine is, as JSON: GPU, driver, compilers, packages. Says what does not work instead of failing."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

GPU_FIELDS = ("name", "driver_version", "memory.total", "compute_cap", "clocks.sm", "clocks.max.sm", "clocks.mem",
              "clocks.max.mem", "power.limit", "temperature.gpu")  # fmt: skip
PACKAGES = ("torch", "triton", "transformers", "numpy", "tokenizers", "safetensors", "typer", "rich", "matplotlib",
            "pytest", "pytest-benchmark", "pytest-xdist", "hypothesis", "scipy", "gguf", "setuptools", "pybind11",
            "cmake", "ninja", "flash-attn", "flashinfer-python")  # fmt: skip
# Torch says more than nvidia-smi, but its import may fail or take long: a process of its own.
_ASK_TORCH = """
import json, torch
properties = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps({
    "cuda_available": properties is not None,
    "built_for_cuda": torch.version.cuda,
    "multiprocessors": properties and properties.multi_processor_count,
    "l2_bytes": properties and properties.L2_cache_size,
    "memory_bytes": properties and properties.total_memory,
}))
"""


def output(*argv: str, seconds: float = 10.0) -> str:
    """What a command prints; empty if it cannot."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def gpus() -> list[dict[str, str]]:
    table = output("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader")
    return [
        dict(zip(GPU_FIELDS, (cell.strip() for cell in line.split(",")), strict=False)) for line in table.splitlines()
    ]


def packages() -> dict[str, str | None]:
    """None: not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit(root: Path) -> str | None:
    return output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12") or None


def environment(root: Path) -> dict[str, Any]:
    nvcc = output("nvcc", "--version") or output("/usr/local/cuda/bin/nvcc", "--version")
    asked = output(sys.executable, "-c", _ASK_TORCH, seconds=60.0)
    return {
        "gpus": gpus(),
        "torch": json.loads(asked) if asked.startswith("{") else None,  # None: it cannot be imported
        "nvcc": nvcc.splitlines()[-2] if nvcc.count("\n") else None,  # before the last line, which names the build
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": commit(root),
        "packages": packages(),
    }


if __name__ == "__main__":
    found = environment(Path(__file__).resolve().parents[2])
    Path(sys.argv[1]).write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))

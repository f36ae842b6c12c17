"""What the GPU suite runs, in order of value: each stage's commands, limits, and the files that it writes."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

DRY = "DRY RUN"
CUDA_HOME = Path("/usr/local/cuda")  # where a toolkit that is not on PATH usually lies


@dataclass(frozen=True)
class Command:
    """``share``: of what is left of the stage's time. ``instead``: it runs only if the command before it failed."""

    name: str
    argv: tuple[str, ...]
    share: float = 1.0
    instead: bool = False


@dataclass(frozen=True)
class Stage:
    """``limit``: its seconds. ``least``: with fewer left it is not begun. ``needs``: modules it cannot run without."""

    name: str
    limit: float
    commands: tuple[Command, ...]
    files: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    scripts: tuple[str, ...] = ()
    least: float = 15.0
    on_gpu: bool = True
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where the suite runs: the checkout, and the folder of its results."""

    root: Path
    out: Path
    dry: bool = False

    @property
    def prefix(self) -> str:
        """Of raw results, so that no file of a dry run can be taken for a measurement."""
        return "dry-run-" if self.dry else ""

    def file(self, name: str) -> Path:
        return self.out / f"{self.prefix}{name}"

    @property
    def built(self) -> bool:
        """A dry run on the CPU needs no CUDA kernels."""
        folders = ("cpu",) if self.dry else ("cpu", "cuda")
        return all(list((self.root / "pearl_kernels" / folder).glob("*.so")) for folder in folders)


def stages(place: Place, compute_capability: str = "") -> tuple[Stage, ...]:
    """``compute_capability``: as nvidia-smi says it, "9.0"; kernels are compiled for this one alone."""
    every = (_build(place, compute_capability), _environment(place), _tests(place), _kernels(place), _latency(place))
    return (*every, _end_to_end(place))


def _python(name: str, *arguments: str, share: float = 1.0) -> Command:
    return Command(name, (sys.executable, *arguments), share)


_CMAKE_ALONE = """
set -e
python=$1 root=$2 work=$2/build/gpu_suite
pybind11=$("$python" -m pybind11 --cmakedir)
cmake --fresh -S "$root" -B "$work" -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$pybind11" \\
  -DPEARL_OUTPUT_DIR="$root/pearl_kernels" $CMAKE_ARGS
cmake --build "$work" --parallel "$(nproc)"
"""


def _build(place: Place, compute_capability: str) -> Stage:
    """With pip; else, where it cannot (setuptools before 77, no ninja), with CMake alone: PYTHONPATH does the rest."""
    pip = (*("-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"),
           "--disable-pip-version-check", "-e", ".")  # fmt: skip
    cmake = ("bash", "-c", _CMAKE_ALONE, "cmake", sys.executable, str(place.root))
    given = os.environ.get("CMAKE_ARGS", "")
    environment = {"CMAKE_ARGS": given}
    if compute_capability and "CUDAARCHS" not in os.environ and "CUDA_ARCHITECTURES" not in given:
        architecture = compute_capability.replace(".", "")
        environment["CMAKE_ARGS"] = f"{given} -DCMAKE_CUDA_ARCHITECTURES={architecture}-real".strip()
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ and (CUDA_HOME / "bin" / "nvcc").exists():
        environment["CUDACXX"] = str(CUDA_HOME / "bin" / "nvcc")
    commands = (_python("pip", *pip), Command("CMake alone", cmake, instead=True))
    return Stage("build", 90.0, commands, on_gpu=False, environment=environment)


def _environment(place: Place) -> Stage:
    """The first command needs no torch that works; the second says why each provider does or does not run."""
    commands = (
        _python("machine", "-m", "bench.gpu_suite.environment", str(place.file("environment.json")), share=0.6),
        _python("providers", "-m", "pearl_kernels.report", "--no-compile", "--json", str(place.file("providers.json"))),
    )
    return Stage("environment", 30.0, commands, ("environment.json", "providers.json"), on_gpu=False, least=5.0)


def _tests(place: Place) -> Stage:
    """Every operator on the GPU against its reference, and what else is marked for one."""
    junit, also = place.file("tests.xml"), place.file("tests-triton.xml")
    pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=20", "--continue-on-collection-errors")
    if place.dry:
        chosen = ("tests/ops/test_copy_blocks.py", "tests/ops/test_philox.py")
        commands: tuple[Command, ...] = (_python("pytest", *pytest, *chosen, f"--junitxml={junit}"),)
    else:
        # Triton's attention kernels with splits and plans, which no provider's operator reaches; they run on the GPU
        # where there is one, while the shim's CUDA kernels stay on the CPU.
        triton = ("tests/emulated/test_emulated_attention.py", "-k", "not cuda")
        parallel = ("-n", "6", "--dist", "load") if has_module("xdist") else ()
        commands = (
            _python("pytest -m gpu", *pytest, *parallel, "tests", "-m", "gpu", f"--junitxml={junit}", share=0.8),
            _python("pytest of Triton's attention", *pytest, *parallel, *triton, f"--junitxml={also}"),
        )
    return Stage(
        "tests",
        60.0 if place.dry else 140.0,
        commands,
        ("tests.xml", "tests-triton.xml"),
        needs=("pytest",),
        least=20.0,
    )


AIMS = "(verify_attention and 8192) or ((test_sample or test_verify) and 128256)"
OTHERS = "not test_linear and not (verify_attention and (8192 or 32768)) and not 128256 and not 151936"


def _kernels(place: Place) -> Stage:
    """What there is an aim for comes first; the rest gets what is left of the time."""
    pytest = ("-m", "pytest", "bench", "--benchmark-only", "-q", "-p", "no:cacheprovider")
    if place.dry:
        chosen = ("--shapes", "tiny", "--device", "cpu", "-k", "verify or sample")
        commands: tuple[Command, ...] = (
            _python("pytest bench", *pytest, *chosen, f"--benchmark-json={place.file('kernels-aims.json')}"),
        )
    else:
        commands = tuple(
            _python(name, *pytest, "-k", chosen, f"--benchmark-json={place.file(name)}", share=share)
            for name, chosen, share in (("kernels-aims.json", AIMS, 0.75), ("kernels-others.json", OTHERS, 1.0))
        )
    needs = ("pytest", "pytest_benchmark", "rich")
    return Stage("kernels", 45.0 if place.dry else 110.0, commands, ("kernels-aims.json", "kernels-others.json"), needs)


def _latency(place: Place) -> Stage:
    script = "bench/latency.py"
    if place.dry:
        tiny = "--batch 1,2 --context 64 --rounds 5 --device cpu --dtype float32"
        runs = [("latency-tiny.json", "tiny-target:tiny-draft", tiny)]
    else:
        runs = [
            ("latency-8b-1b.json", "8b:1b", "--batch 1,8,32 --context 1024,8192 --rounds 20 --eager-too"),
            ("latency-32b-1b.json", "32b:1b", "--batch 1,8 --context 1024 --rounds 20 --no-eager-too"),
        ]
    commands = tuple(
        _python(
            f"latency of {shapes}",
            *(script, "--shapes", shapes, *options.split(), "--synthetic-acceptance", "0.8"),
            *("--json", str(place.file(name))),
            share=share,
        )
        for (name, shapes, options), share in zip(runs, (0.65, 1.0), strict=False)
    )
    files = tuple(name for name, _, _ in runs)
    return Stage("latency", 60.0 if place.dry else 150.0, commands, files, needs=("typer", "rich"), scripts=(script,))


def _end_to_end(place: Place) -> Stage:
    """Equal outputs first: a speed is worth nothing without them."""
    if place.dry:
        device, greedy = "cpu", "--prompts 2 --max-tokens 16"
        throughput = "--prompts 1 --max-tokens 16 --repeats 1"
    else:
        device, greedy = "cuda", "--prompts 8 --max-tokens 64"
        throughput = "--prompts 4 --max-tokens 64 --repeats 3"
    names = ("greedy.json", "throughput.json")
    files = [str(place.file(name)) for name in names]
    commands = (
        _python(
            *("greedy agreement", "bench/greedy_agreement.py"),
            *("--device", device, *greedy.split(), "--json", files[0]),
            share=0.5,
        ),
        _python("throughput", "bench/throughput.py", "--device", device, *throughput.split(), "--json", files[1]),
    )
    return Stage("end_to_end", 60.0 if place.dry else 75.0, commands, names, needs=("typer", "rich"))


def has_module(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None

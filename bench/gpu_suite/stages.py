"""What the GPU suite runs, in order of value: each stage's commands, limits, and the files that it writes."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from sysconfig import get_config_var

DRY = "DRY RUN"
CUDA_HOME = Path("/usr/local/cuda")  # where a toolkit that is not on PATH usually lies
# Where tests marked ``gpu`` are: collecting all others would take longer than some of these. A test compares.
GPU_TESTS = (
    "tests/ops",
    "tests/e2e/test_gpu.py",
    "tests/engine/test_kv_budget.py",
    "tests/engine/test_batch_arrays.py",
    "tests/bench/test_bench_bandwidth.py",
)
_SPARE_CORES, _MOST_WORKERS = 4, 12  # each worker is a process with a context on the GPU


@dataclass(frozen=True)
class Command:
    """``share``: of what is left of the stage's time."""

    name: str
    argv: tuple[str, ...]
    share: float = 1.0


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
    """Where the suite runs: the checkout, the folder of what is handed over, and one of what a later command needs.

    ``out`` gets few files (report.py). ``work`` keeps what was built, and all raw results and logs.
    """

    root: Path
    out: Path
    work: Path
    dry: bool = False

    @property
    def prefix(self) -> str:
        """Of raw results, so that no file of a dry run can be taken for a measurement."""
        return "dry-run-" if self.dry else ""

    @property
    def results(self) -> Path:
        return self.work / "results"

    def file(self, name: str) -> Path:
        return self.results / f"{self.prefix}{name}"

    def log(self, stage: str) -> Path:
        return self.results / "logs" / f"{stage}.log"

    @property
    def built(self) -> bool:
        """For this Python and from these sources. A dry run on the CPU takes what is there, without CUDA kernels."""
        folders, suffix = ("cpu",) if self.dry else ("cpu", "cuda"), get_config_var("EXT_SUFFIX")
        if not all(list((self.root / "pearl_kernels" / name).glob(f"*{suffix}")) for name in folders):
            return False
        return self.dry or (self._stamp.exists() and self._stamp.read_text() == self._sources())

    def note_built(self) -> None:
        self._stamp.write_text(self._sources())

    @property
    def _stamp(self) -> Path:
        return self.work / "built-from"

    def _sources(self) -> str:
        """By content: a machine that gets the checkout anew for each command has new times of change."""
        digest = hashlib.sha256()
        for path in (self.root / "CMakeLists.txt", *sorted(self.root.glob("csrc/**/*"))):
            if path.is_file():
                digest.update(f"{path.relative_to(self.root)} {path.stat().st_size}\n".encode() + path.read_bytes())
        return digest.hexdigest()


def stages(place: Place, compute_capability: str = "") -> tuple[Stage, ...]:
    """``compute_capability``: as nvidia-smi says it, "9.0"; kernels are compiled for this one alone."""
    return (
        _build(place, compute_capability), _environment(place), _smoke(place), _latency(place), _agreement(place),
        _kernels(place), _tests(place), _latency_32b(place), _more(place),
    )  # fmt: skip


def _python(name: str, *arguments: str, share: float = 1.0) -> Command:
    return Command(name, (sys.executable, *arguments), share)


_CMAKE = """
set -e
python=$1 root=$2 work=$3
if command -v ninja >/dev/null; then export CMAKE_GENERATOR=Ninja; fi
cmake -S "$root" -B "$work" -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \\
  -DPEARL_OUTPUT_DIR="$root/pearl_kernels" $CMAKE_ARGS
cmake --build "$work" --parallel "$(nproc)"
"""


def _build(place: Place, compute_capability: str) -> Stage:
    """CMake alone, in a folder that stays: PYTHONPATH does what an installation would."""
    folder = place.work / f"cmake-{sys.implementation.cache_tag}"
    command = Command("cmake", ("bash", "-c", _CMAKE, "cmake", sys.executable, str(place.root), str(folder)))
    given = os.environ.get("CMAKE_ARGS", "")
    environment = {"CMAKE_ARGS": given}
    if compute_capability and "CUDAARCHS" not in os.environ and "CUDA_ARCHITECTURES" not in given:
        architecture = compute_capability.replace(".", "")
        environment["CMAKE_ARGS"] = f"{given} -DCMAKE_CUDA_ARCHITECTURES={architecture}-real".strip()
    if shutil.which("nvcc") is None and "CUDACXX" not in os.environ and (CUDA_HOME / "bin" / "nvcc").exists():
        environment["CUDACXX"] = str(CUDA_HOME / "bin" / "nvcc")
    return Stage(
        "build", 150.0, (command,), needs=("pybind11",), least=30.0, on_gpu=False, environment=environment
    )  # fmt: skip


def _environment(place: Place) -> Stage:
    """The first command needs no torch that works; the second says why each provider does or does not run."""
    commands = (
        _python("machine", "-m", "bench.gpu_suite.environment", str(place.file("environment.json")), share=0.6),
        _python("providers", "-m", "pearl_kernels.report", "--no-compile", "--json", str(place.file("providers.json"))),
    )
    files = ("environment.json", "providers.json")
    return Stage("environment", 30.0 if place.dry else 25.0, commands, files, on_gpu=False, least=5.0)


def _pytest(*more: str) -> tuple[str, ...]:
    """Tests after one that breaks the GPU's context are skipped, and do not count as failures of their own."""
    return ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.gpu_suite.broken_context", *more)


def _parallel() -> tuple[str, ...]:
    workers = max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) - _SPARE_CORES))
    return ("-n", str(workers), "--dist", "load") if has_module("xdist") else ()


def _smoke(place: Place) -> Stage:
    """Every operator of every provider once, on tiny shapes, eagerly and from a graph, against its reference."""
    device, parallel = ("cpu", ()) if place.dry else ("cuda", _parallel())
    command = _python(
        "every operator", *_pytest("bench", *parallel, "--benchmark-disable", "--shapes", "tiny", "--device", device),
        *("-k", "not linear", f"--junitxml={place.file('smoke.xml')}"),
    )  # fmt: skip
    needs = ("pytest", "pytest_benchmark", "rich")
    return Stage("smoke", 60.0 if place.dry else 45.0, (command,), ("smoke.xml",), needs, least=20.0)


def _latency_of(place: Place, name: str, shapes: str, options: str, share: float = 1.0) -> Command:
    return _python(
        f"latency of {shapes}",
        *("bench/latency.py", "--shapes", shapes, *options.split(), "--synthetic-acceptance", "0.8"),
        *("--json", str(place.file(name))),
        share=share,
    )


def _latency(place: Place) -> Stage:
    """What graphs cost first, for all cells; then one cell without them."""
    if place.dry:
        tiny = "--batch 1,2 --context 64 --rounds 5 --device cpu --dtype float32"
        runs = [("latency-tiny.json", "tiny-target:tiny-draft", tiny, 1.0)]
    else:
        cells, one = "--batch 1,8,32 --context 1024,8192", "--batch 1 --context 1024"
        runs = [
            ("latency-8b-1b.json", "8b:1b", f"{cells} --rounds 20 --no-eager-too", 0.75),
            ("latency-8b-1b-eager.json", "8b:1b", f"{one} --rounds 10 --eager-too", 1.0),
        ]
    commands = tuple(_latency_of(place, *run) for run in runs)
    limit, scripts = 60.0 if place.dry else 110.0, ("bench/latency.py",)
    return Stage("latency", limit, commands, tuple(run[0] for run in runs), ("typer", "rich"), scripts, least=30.0)


def _latency_32b(place: Place) -> Stage:
    if place.dry:
        name, shapes = "latency-32b-tiny.json", "tiny-target:tiny-draft"
        options = "--batch 1 --context 64 --rounds 2 --device cpu --dtype float32"
    else:
        name, shapes = "latency-32b-1b.json", "32b:1b"
        options = "--batch 1,8 --context 1024 --rounds 20 --no-eager-too"
    command, scripts = _latency_of(place, name, shapes, options), ("bench/latency.py",)
    return Stage(
        "latency_32b", 30.0 if place.dry else 40.0, (command,), (name,), ("typer", "rich"), scripts, least=30.0
    )


def _agreement(place: Place) -> Stage:
    """Equal outputs, before any more speeds."""
    options = "--device cpu --prompts 2 --max-tokens 16" if place.dry else "--device cuda --prompts 8 --max-tokens 64"
    script = "bench/greedy_agreement.py"
    command = _python("greedy agreement", script, *options.split(), "--json", str(place.file("greedy.json")))
    limit = 40.0 if place.dry else 45.0
    return Stage("agreement", limit, (command,), ("greedy.json",), ("typer", "rich"), (script,), least=20.0)


AIMS = "(verify_attention and 8192) or ((test_sample or test_verify) and 128256)"
OTHERS = "not test_linear and not (verify_attention and (8192 or 32768)) and not 128256 and not 151936"


def _kernel_bench(place: Place, name: str, *chosen: str, share: float = 1.0) -> Command:
    results = f"--benchmark-json={place.file(name)}"
    return _python(name, *_pytest("bench", "--benchmark-only", *chosen, results), share=share)


def _kernels(place: Place) -> Stage:
    """What there is an aim for. Nothing else may run meanwhile."""
    chosen = ("--shapes", "tiny", "--device", "cpu", "-k", "verify or sample") if place.dry else ("-k", AIMS)
    command = _kernel_bench(place, "kernels-aims.json", *chosen)
    needs = ("pytest", "pytest_benchmark", "rich")
    return Stage("kernels", 45.0 if place.dry else 55.0, (command,), ("kernels-aims.json",), needs, least=20.0)


def _tests(place: Place) -> Stage:
    """Every operator on the GPU against its reference, and what else is marked for one.

    First what can share the GPU; then, one after another, what fills its memory or measures it.
    """
    if place.dry:
        chosen = ("tests/ops/test_copy_blocks.py", "tests/ops/test_philox.py", f"--junitxml={place.file('tests.xml')}")
        commands: tuple[Command, ...] = (_python("pytest", *_pytest(*chosen)),)
    else:
        # Triton's attention kernels with splits and plans, which no provider's operator reaches; they run on the GPU
        # where there is one, while the shim's CUDA kernels stay on the CPU.
        triton = ("tests/emulated/test_emulated_attention.py", "-k", "not cuda")
        shared, alone = (*_parallel(), *GPU_TESTS, "-m", "gpu and not alone"), (*GPU_TESTS, "-m", "gpu and alone")
        runs = (
            ("pytest of what can share the GPU", shared, "tests.xml", 0.65),
            ("pytest of what needs it alone", alone, "tests-alone.xml", 0.6),
            ("pytest of Triton's attention", (*_parallel(), *triton), "tests-triton.xml", 1.0),
        )
        # Of a loan of minutes: so many failures say what is wrong, and leave the other stages their time.
        options = ("--maxfail=40", "--continue-on-collection-errors")
        commands = tuple(
            _python(name, *_pytest(*options, *chosen, f"--junitxml={place.file(file)}"), share=share)
            for name, chosen, file, share in runs
        )
    files = ("tests.xml", "tests-alone.xml", "tests-triton.xml")
    return Stage("tests", 60.0 if place.dry else 65.0, commands, files, ("pytest",), least=25.0)


def _more(place: Place) -> Stage:
    """What there is no aim for gets what is left."""
    speeds = ("throughput", "bench/throughput.py", "--json", str(place.file("throughput.json")))
    if place.dry:
        options = "--device cpu --prompts 1 --max-tokens 16 --repeats 1"
        commands: tuple[Command, ...] = (_python(*speeds, *options.split()),)
    else:
        options = "--device cuda --prompts 4 --max-tokens 64 --repeats 3"
        commands = (
            _python(*speeds, *options.split(), share=0.5),
            _kernel_bench(place, "kernels-others.json", "-k", OTHERS),
        )
    needs = ("typer", "rich", "pytest", "pytest_benchmark")
    return Stage(
        "more", 30.0 if place.dry else 15.0, commands, ("throughput.json", "kernels-others.json"), needs
    )  # fmt: skip


def has_module(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None

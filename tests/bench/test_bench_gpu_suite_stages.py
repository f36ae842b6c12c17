"""What the GPU suite would run: stages and their limits within the budget, reasons to skip one, options."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from bench_support import ROOT

from bench.gpu_suite import suite
from bench.gpu_suite.stages import Place, Stage, stages
from bench.gpu_suite.suite import RESERVE, Budget, Stop, why_not


@pytest.fixture
def place(tmp_path: Path) -> Place:
    place = Place(ROOT, tmp_path, tmp_path / "work")
    place.results.mkdir(parents=True)
    return place


def test_what_a_stage_leaves_over_goes_to_the_next() -> None:
    now = [0.0]
    budget = Budget(300.0, lambda: now[0], begin=0.0)
    first, second, third = (Stage(name, 80.0, ()) for name in "abc")
    assert budget.limit(first, [second, third]) == 300 - RESERVE - 80 - 80
    now[0] = 20.0
    assert budget.limit(second, [third]) == 300 - RESERVE - 20 - 80
    now[0] = 190.0
    assert budget.limit(second, [third]) == 80, "its own limit, though the next one gets less"
    assert budget.limit(third, []) == 90
    now[0] = 250.0
    assert budget.limit(third, []) == 30
    now[0] = 290.0
    assert budget.limit(third, []) < 0


def test_the_limits_of_all_stages_fit_into_a_command_of_ten_minutes(place: Place) -> None:
    """No stage can take another's time, even if every one of them hangs."""
    assert suite.BUDGET <= 10 * 60 - 30
    assert sum(stage.limit for stage in stages(place)) <= suite.BUDGET - RESERVE
    assert all(stage.least <= stage.limit for stage in stages(place))


def test_stages_come_in_the_order_of_their_value(place: Place) -> None:
    order = ["build", "environment", "smoke", "latency", "agreement", "kernels", "tests", "latency_32b", "more"]
    assert [stage.name for stage in stages(place)] == order
    assert [stage.name for stage in stages(replace(place, dry=True))] == order


def test_a_stage_is_skipped_for_a_reason(place: Place) -> None:
    stop = Stop()
    assert why_not(Stage("a", 9, (), least=5.0), 5.0, place, stop) == ""
    assert why_not(Stage("a", 9, (), least=5.0), 4.0, place, stop) == "4 s of the budget are left, it needs 5"
    absent = why_not(Stage("a", 9, (), needs=("json", "no_such_module")), 99, place, stop)
    assert absent == f"no_such_module cannot be imported by {sys.executable}"
    gone = why_not(Stage("a", 9, (), scripts=("bench/throughput.py", "bench/no.py")), 99, place, stop)
    assert gone == "bench/no.py is not in this checkout"
    place.file("environment.json").write_text('{"torch": {"cuda_available": false}}')
    assert "torch sees no CUDA device" in why_not(Stage("a", 9, ()), 99, place, stop)
    assert why_not(Stage("a", 9, (), on_gpu=False), 99, place, stop) == ""
    place.file("environment.json").write_text('{"torch": null}')
    assert "torch sees no CUDA device" in why_not(Stage("a", 9, ()), 99, place, stop)
    place.file("environment.json").write_text('{"torch": {"cuda_available": true}}')
    assert why_not(Stage("a", 9, ()), 99, place, stop) == ""
    stop.number = signal.SIGTERM
    assert why_not(Stage("a", 9, ()), 99, place, stop) == "the suite was interrupted"


def test_the_build_compiles_for_the_gpu_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cmake_arguments() -> str:
        place = Place(ROOT, tmp_path, tmp_path / "work")
        (build,) = (stage for stage in stages(place, "9.0") if stage.name == "build")
        return build.environment["CMAKE_ARGS"]

    for variable in ("CMAKE_ARGS", "CUDAARCHS"):
        monkeypatch.delenv(variable, raising=False)
    assert cmake_arguments() == "-DCMAKE_CUDA_ARCHITECTURES=90-real"
    monkeypatch.setenv("CMAKE_ARGS", "-DA=1")
    assert cmake_arguments() == "-DA=1 -DCMAKE_CUDA_ARCHITECTURES=90-real"
    monkeypatch.setenv("CUDAARCHS", "80")
    assert cmake_arguments() == "-DA=1"


def test_every_command_names_files_of_its_own_run(tmp_path: Path) -> None:
    """A dry run's results can be told from a measurement by their names."""
    for dry in (True, False):
        place = Place(ROOT, tmp_path, tmp_path / "work", dry)
        every = [word for stage in stages(place) for command in stage.commands for word in command.argv]
        written = [Path(word.rpartition("=")[2]) for word in every if str(place.results) in word]
        assert len(written) == len(set(written)) >= 7
        assert all(path.name.startswith("dry-run-") is dry for path in written)
        assert {p.name.removeprefix("dry-run-") for p in written} <= {f for s in stages(place) for f in s.files}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--only", "tests,magic"), "--only: 'magic' is not one of build, environment, smoke, latency, agreement, "),
        (("--only", ","), "--only names none; there are build, environment"),
        (("--from", "magic"), "--from: 'magic' is not one of build, environment"),
        (("--from", "tests", "--only", "tests"), "not allowed with argument"),
        (("--budget", "3"), "--budget must be at least 5 seconds, not 3"),
        (("--budget", "nan"), "--budget must be at least 5 seconds, not nan"),
        (("--budget", "soon"), "invalid float value: 'soon'"),
        (("--dry",), "unrecognized arguments: --dry"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(
    arguments: Sequence[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        suite.main(arguments)
    assert leaving.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]

"""``bench/latency.py`` when it is interrupted, when a cell does not fit, and when something breaks."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bench_support import Finished
from latency_support import LABEL, TINY, Measurements, cells_of, failing, numbers

from bench.round_latency import memory, program
from bench.round_latency.cell import RoundFailed
from bench.round_latency.memory import DoesNotFit, explaining_what_does_not_fit, free_host_bytes
from bench.round_latency.report import Cell, Report, write_json
from pearl.errors import ConfigurationError

Script = Callable[..., Finished]
SCRIPT = "latency.py"


@pytest.fixture(autouse=True)
def a_known_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring memory takes a second, and is tested elsewhere."""
    monkeypatch.setattr(program, "read_bandwidth", lambda size, device, threads: 20.0)


GRID = (*TINY, "--batch", "1,2", "--context", "32,64", "--rounds", "2")


def test_an_interruption_keeps_the_cells_that_are_done(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "measure", Measurements(3, lambda: os.kill(os.getpid(), signal.SIGINT)))
    out = tmp_path / "latency.json"
    finished = script(*GRID, "--json", str(out))
    assert finished.code == 130
    report = json.loads(out.read_text())
    assert [(c["batch"], c["context"]) for c in report["cells"]] == [(1, 32), (1, 64)]
    assert report["interrupted"] is True
    assert "interrupted: what is missing was not measured" in finished.out


def test_an_interruption_while_weights_are_made_measures_nothing(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(program, "random_decoders", interrupted)
    monkeypatch.setattr(program, "assemble_shapes", lambda *_: pytest.fail("a cell was begun"))
    out = tmp_path / "latency.json"
    assert script(*GRID, "--json", str(out)).code == 130
    assert cells_of(out) == []


def test_a_second_interruption_ends_at_once_and_keeps_the_file(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(program, "measure", Measurements(2, twice))
    out = tmp_path / "latency.json"
    assert script(*GRID, "--json", str(out)).code == 130
    assert [(c["batch"], c["context"]) for c in cells_of(out)] == [(1, 32)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore"),
        RoundFailed("OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 GiB"),
        ConfigurationError("one sequence needs more: allocate 3 GiB"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_cell_without_memory_is_skipped_and_the_others_measured(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(program, "measure", Measurements(2, failing(error)))
    out = tmp_path / "latency.json"
    finished = script(*GRID, "--json", str(out))
    assert finished.code == 0
    reasons = [cell["skipped"] for cell in cells_of(out)]
    assert [reason is None for reason in reasons] == [True, False, True, True]
    assert "allocate 3 GiB" in reasons[1]
    assert "\n" not in reasons[1]
    assert "decode_ms" not in cells_of(out)[1]
    assert "batch 1, context 64 skipped: " in finished.out


def test_any_other_failure_ends_the_run_and_keeps_the_file(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RoundFailed("RuntimeError: CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(program, "measure", Measurements(2, failing(error)))
    out = tmp_path / "latency.json"
    finished = script(*GRID, "--json", str(out))
    assert finished.code == 1
    assert finished.err.endswith("error: RuntimeError: CUDA error: an illegal memory access was encountered\n")
    assert len(cells_of(out)) == 1


def test_cells_larger_than_the_machine_are_skipped_before_they_are_made(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 8 << 20)
    monkeypatch.setattr(program, "measure", Measurements(0, lambda: None))
    out = tmp_path / "latency.json"
    assert script(*TINY, "--batch", "1,64", "--context", "1024", "--json", str(out)).code == 0
    small, large = cells_of(out)
    assert small["skipped"] is None
    assert re.fullmatch(
        r"keys and values of 64 requests of \d+ tokens need 0\.\d\d GiB, 0\.01 GiB are free", large["skipped"]
    )


def test_weights_larger_than_the_machine_skip_every_cell(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_host_bytes", lambda: 1 << 30)
    monkeypatch.setattr(program, "random_decoders", lambda *_: pytest.fail("weights were made"))
    out = tmp_path / "latency.json"
    finished = script("--shapes", "70b:1b", "--device", "cpu", "--batch", "1", "--context", "32,64", "--json", str(out))
    assert finished.code == 0
    assert [cell["skipped"] for cell in cells_of(out)] == ["weights need 133.72 GiB, 1.00 GiB are free"] * 2


def test_other_errors_are_not_taken_for_a_want_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shape"), explaining_what_does_not_fit():
        raise RuntimeError("shape mismatch")
    with pytest.raises(DoesNotFit, match="MemoryError"), explaining_what_does_not_fit():
        raise MemoryError


def test_free_memory_is_a_part_of_all() -> None:
    assert 0 < free_host_bytes() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, report = tmp_path / "latency.json", Report({"shapes": "x"}, LABEL)
    write_json(path, report)
    before = path.read_text()
    report.cells.append(Cell("a", "b", 1, 16, latencies=numbers()))

    def ended(self: Path, text: str, encoding: str) -> None:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", ended)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, report)
    assert path.read_text() == before

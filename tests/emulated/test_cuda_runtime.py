"""What the CUDA module asks of the runtime, and leaves behind: errors, the current device, contexts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from cuda_emu import build

pytestmark = build.on_linux

INVALID_VALUE = 1  # cudaError_t
MULTIPROCESSORS, UNKNOWN_ATTRIBUTE = 16, 9999  # cudaDeviceAttr
PRIMITIVES = build.SHIM / "primitives.cu"

#: In a process of its own: `norm(device)` calls the module, and `runtime` tells what became of the devices.
BEGIN = """
import ctypes, importlib.util
def load(path):
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
module, runtime = load({path!r}), ctypes.CDLL({path!r})
x = (ctypes.c_float * 48)(*range(1, 49))
at = ctypes.addressof(x)
def norm(device, dtype=0):
    module.rms_norm(dtype, 1, 16, at, 16, 0, 0, at + 64, at + 128, 1e-5, (device, 0))
    return x[32] > 0
def fails(device, dtype=0):
    try:
        norm(device, dtype)
    except (RuntimeError, ValueError) as error:
        return str(error)
"""


def evaluate(*expressions: str) -> list[Any]:
    """What the expressions are, one after the other."""
    program = BEGIN.format(path=str(build.compiled("norm.cu"))) + "".join(f"print(repr({e}))\n" for e in expressions)
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return [eval(line) for line in finished.stdout.splitlines()]


USED = ("runtime.emu_device_is_used(0)", "runtime.emu_device_is_used(1)", "runtime.emu_current_device()")


def test_a_device_that_nobody_has_used_gets_no_context() -> None:
    """The thread's current device is 0 because it has chosen none; setting it back would fill memory there."""
    worked, *state = evaluate("norm(1)", *USED)
    assert worked
    assert state[:2] == [0, 1]


def test_the_thread_s_device_is_current_again_afterwards() -> None:
    worked, also, *state = evaluate("norm(0)", "norm(1)", *USED)
    assert worked
    assert also
    assert state == [1, 1, 0]


def test_the_current_device_is_not_set() -> None:
    assert evaluate("norm(0)", *USED)[1:] == [1, 0, 0]


@pytest.mark.parametrize(
    ("call", "words"), [("fails(7)", "invalid device ordinal"), ("fails(0, dtype=9)", "invalid argument")]
)
def test_an_error_is_not_left_for_the_next_launch(call: str, words: str) -> None:
    message, left, worked = evaluate(call, "runtime.emu_last_error()", "norm(0)")
    assert words in message
    assert left == 0
    assert worked


def test_an_error_that_another_left_is_neither_reported_nor_taken_away() -> None:
    leave = f"runtime.emu_leave_error({INVALID_VALUE})"
    _, worked, left = evaluate(leave, "norm(0)", "runtime.emu_last_error()")
    assert worked
    assert left == INVALID_VALUE


def alone(*calls: str) -> list[int]:
    """What functions of primitives.cu return, one after the other, in a process of their own."""
    program = f"import ctypes; library = ctypes.CDLL({str(build.compiled_library(PRIMITIVES))!r})\n"
    program += "".join(f"print(library.{call})\n" for call in calls)
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return list(map(int, finished.stdout.split()))


def test_shared_memory_is_allowed_once_for_a_kernel_and_device() -> None:
    asked = "emu_function_attributes()"
    calls = ["run_allow_shared_memory(60000)", asked, "run_allow_shared_memory(50000)", asked]
    calls += ["run_allow_shared_memory(70000)", asked, "run_set_device(1)", "run_allow_shared_memory(70000)", asked]
    assert alone(*calls) == [0, 2, 0, 2, 0, 4, 0, 0, 6]


def test_shared_memory_that_is_refused_is_asked_for_again_and_leaves_no_error() -> None:
    calls = ["run_allow_shared_memory(240000)", "emu_last_error()", "run_allow_shared_memory(60000)"]
    calls += ["run_launch(1, 1, 1, 1, ctypes.c_size_t(60000), 0)"]
    assert alone(*calls) == [INVALID_VALUE, 0, 0, 0]


def test_a_device_is_asked_once_for_an_attribute() -> None:
    ask, asked = f"run_device_attribute({MULTIPROCESSORS})", "emu_attribute_queries()"
    assert alone(ask, ask, asked, "run_set_device(1)", ask, asked) == [4, 4, 1, 0, 4, 2]
    assert alone(f"run_device_attribute({UNKNOWN_ATTRIBUTE})", "emu_last_error()") == [-INVALID_VALUE, 0]

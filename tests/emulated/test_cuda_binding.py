"""The CUDA module's Python side: refused arguments, errors that name the operator, and why the provider cannot run."""

from __future__ import annotations

import importlib
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_emu import build

from pearl_kernels import Situation, cuda
from pearl_kernels.checks import Checks
from pearl_kernels.native import NativeModule
from pearl_kernels.native.module import workspace
from pearl_kernels.registry import explain

needs_shim = build.on_linux
INVALID = 7  # a dtype that no kernel has

x, weight = torch.randn(3, 16), torch.randn(16)


@needs_shim
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("rms_norm", (x.double(), weight.double(), 1e-5), "rms_norm: x must be float32 or bfloat16 or float16"),
        ("rms_norm", (x, weight.half(), 1e-5), "rms_norm: weight must be contiguous torch.float32"),
        ("rms_norm", (x.to("meta"), weight, 1e-5), "rms_norm: x must be torch.float32 .* on cpu, not .* on meta"),
        ("add_rms_norm", (x, x[:2], weight, 1e-5), "add_rms_norm: residual must be"),
        ("silu_and_mul", (x[:, :5],), "silu_and_mul: x must have an even width, not 5"),
        ("copy_blocks", (x, torch.zeros(1, 2)), "copy_blocks: pairs must be contiguous torch.int64"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_tensors_are_checked_as_on_the_cpu(op: str, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build.operator(op)(*arguments)


@needs_shim
def test_a_kernel_that_refuses_is_a_value_error_with_the_operator_s_name() -> None:
    module = build.module("norm.cu")
    with pytest.raises(ValueError, match=r"^rms_norm: CUDA error: invalid argument; the kernel cannot take these"):
        module.rms_norm(INVALID, 3, 16, x.data_ptr(), 16, 0, 0, weight.data_ptr(), x.data_ptr(), 1e-5, (0, 0))


@needs_shim
def test_another_cuda_error_is_a_runtime_error_with_the_operator_s_name() -> None:
    module = build.module("norm.cu")
    with pytest.raises(RuntimeError, match=r"^rms_norm: CUDA error: invalid device ordinal$"):
        module.rms_norm(0, 3, 16, x.data_ptr(), 16, 0, 0, weight.data_ptr(), x.data_ptr(), 1e-5, (3, 0))


@needs_shim
@pytest.mark.parametrize("where", [None, 0, (0,), ("0", 0)])
def test_where_is_a_device_and_a_stream(where: Any) -> None:
    with pytest.raises(TypeError, match="silu_and_mul"):
        build.module("activation.cu").silu_and_mul(0, 0, 8, 0, 8, 0, where)


def test_an_operator_s_workspace_is_as_large_as_it_asks_for() -> None:
    calls: list[tuple[Any, ...]] = []

    class Module:
        def op(self, *arguments: Any) -> None:
            calls.append(("op", *arguments))

        def op_workspace(self, *arguments: Any) -> int:
            calls.append(("op_workspace", *arguments))
            return 48

    made: list[torch.Tensor] = []

    def scratch(like: torch.Tensor, size: int) -> torch.Tensor:
        made.append(workspace(like, size))
        return made[-1]

    module: Any = Module()
    NativeModule(module, Checks("cpu", ()), lambda tensor: (tensor.shape[0], 5), scratch).run("op", x, (1, "two"))
    assert made[0].dtype == torch.uint8
    assert made[0].shape == (48,)
    assert calls == [("op_workspace", 1, "two", (3, 5)), ("op", 1, "two", made[0].data_ptr(), 48, (3, 5))]
    calls.clear()
    NativeModule(module, Checks("cpu", ())).run("op", x, (1, "two"))
    assert calls == [("op", 1, "two", None)]


GPU = Situation(device="cuda", dtype=torch.bfloat16, head_dim=128)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine that can run everything; a test takes away what it wants."""
    it = SimpleNamespace(driver=13000, runtime=13000, devices=1, capability=(9, 0), shared=228 << 10)
    module = SimpleNamespace(driver_version=lambda: it.driver, runtime_version=lambda: it.runtime)
    module.verify_attention_shared = lambda dtype, head_dim: (144 if head_dim > 128 else 80) << 10
    monkeypatch.setitem(sys.modules, "pearl_kernels.cuda._cuda", module)
    monkeypatch.setattr(cuda, "_cuda", module, raising=False)  # the package's own name for it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: it.devices > 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: it.capability)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda: SimpleNamespace(shared_memory_per_multiprocessor=it.shared)
    )
    return it


def test_operators_run_on_the_tensor_s_device_and_its_current_stream(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "pearl_kernels.cuda.operators", raising=False)
    operators = importlib.import_module("pearl_kernels.cuda.operators")
    monkeypatch.delitem(sys.modules, "pearl_kernels.cuda.operators")
    streams = {torch.device("cuda", 2): SimpleNamespace(cuda_stream=0x5000)}
    monkeypatch.setattr(torch.cuda, "current_stream", streams.__getitem__)
    tensor: Any = SimpleNamespace(device=torch.device("cuda", 2), get_device=lambda: 2)
    assert operators.where(tensor) == (2, 0x5000)
    for op in cuda.OPERATORS:
        native = getattr(operators, op).__self__
        assert native.module is sys.modules["pearl_kernels.cuda._cuda"]
        assert native.where is operators.where
        assert native.scratch is workspace
        assert native.checks == Checks("cuda", cuda.DTYPES)


def test_each_stream_has_counters_of_its_own_made_before_it_captures(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls on one stream follow each other and share; a graph must find them where they were, and zero."""
    monkeypatch.delitem(sys.modules, "pearl_kernels.cuda.operators", raising=False)
    operators = importlib.import_module("pearl_kernels.cuda.operators")
    monkeypatch.delitem(sys.modules, "pearl_kernels.cuda.operators")
    now = SimpleNamespace(device=0, stream=7, captures=False)
    monkeypatch.setattr(operators, "where", lambda _: (now.device, now.stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now.captures)
    counters, tensor = operators.StreamCounters(12), torch.empty(0)
    first = counters(tensor)
    assert first.tolist() == [0] * 12
    assert first.dtype == torch.int32
    now.captures = True
    assert counters(tensor) is first
    now.stream = 8
    assert counters(tensor) is None  # zeroing them would be part of the graph
    now.captures = False
    second = counters(tensor)
    assert second.data_ptr() != first.data_ptr()
    now.device, now.stream = 1, 7
    assert counters(tensor).data_ptr() not in (first.data_ptr(), second.data_ptr())
    now.device = 0
    assert counters(tensor) is first
    assert isinstance(operators.verify_attention.__self__.counters, operators.StreamCounters)


@pytest.mark.parametrize("op", cuda.OPERATORS)
def test_on_a_gpu_with_a_driver_it_runs(machine: SimpleNamespace, op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert cuda.refuses(op, Situation(device="cuda", dtype=dtype, head_dim=256)) is None


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [
        ({"driver": 0}, "there is no NVIDIA driver"),
        ({"driver": 12080}, r"the driver is for CUDA 12\.8, older than CUDA 13\.0, which the kernels were built with"),
        ({"driver": 13000, "runtime": 13020}, None),  # a driver runs all of its major version
        ({"driver": 14000}, None),
        ({"devices": 0}, "torch finds no CUDA device"),
        ({"capability": (7, 5)}, r"needs compute capability 8\.0 or newer; this GPU has 7\.5"),
        ({"capability": (8, 0)}, None),
        ({"capability": (12, 1)}, None),
    ],
    ids=str,
)
def test_what_a_machine_lacks_is_told(machine: SimpleNamespace, lacks: dict[str, Any], reason: str | None) -> None:
    vars(machine).update(lacks)
    refusal = cuda.refuses("verify", GPU)
    if reason is None:
        assert refusal is None
    else:
        assert refusal is not None
        assert re.match(reason, refusal)


@pytest.mark.parametrize(
    ("op", "situation", "reason"),
    [
        ("verify", Situation(device="cpu"), "runs on cuda, not on cpu"),
        ("verify", Situation(device="mps"), "runs on cuda, not on mps"),
        ("rms_norm", Situation("cuda", torch.float64), "computes float32, bfloat16 and float16, not torch.float64"),
        (
            "verify_attention",
            Situation("cuda", head_dim=12),
            "needs a head_dim that is a multiple of 8 up to 256, not 12",
        ),
        (
            "rope_and_cache",
            Situation("cuda", head_dim=264),
            "needs a head_dim that is a multiple of 8 up to 256, not 264",
        ),
        ("rms_norm", Situation("cuda", head_dim=264), None),
        ("copy_blocks", Situation("cuda", torch.float8_e4m3fn), None),
    ],
)
def test_what_the_kernels_cannot_do_is_told(
    machine: SimpleNamespace, op: str, situation: Situation, reason: str | None
) -> None:
    assert cuda.refuses(op, situation) == reason


@pytest.mark.parametrize(("shared", "head_dim"), [(100, 256), (100, 136), (100, 128), (164, 256), (228, 256)])
def test_attention_is_refused_where_its_blocks_do_not_fit(machine: SimpleNamespace, shared: int, head_dim: int) -> None:
    """Cards with 99 KiB of shared memory for a block."""
    machine.shared = shared << 10
    situation = Situation("cuda", torch.bfloat16, head_dim)
    assert cuda.refuses("rope_and_cache", situation) is None
    reason = cuda.refuses("verify_attention", situation)
    if shared > 100 or head_dim <= 128:
        assert reason is None
    else:
        assert reason == (
            f"needs 144 KiB of shared memory for a head_dim of {head_dim} in torch.bfloat16; "
            "a block has 99 KiB on this GPU"
        )


@needs_shim
def test_the_shared_memory_that_attention_says_it_needs_is_what_its_smallest_ring_takes() -> None:
    """Queries, and two stages of 64 keys and values; in fp32 probabilities too, and tiles of 32."""
    needed = build.module("attention.cu").verify_attention_shared
    for code in (1, 2):
        assert [needed(code, width) >> 10 for width in (64, 72, 128, 256)] == [8 + 32, 16 + 64, 16 + 64, 16 + 128]
    assert [needed(0, width) >> 10 for width in (64, 128, 256)] == [4 + 2 + 32, 8 + 2 + 64, 16 + 2 + 128]


def test_without_the_compiled_module_the_reason_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pearl_kernels.cuda._cuda", None)  # as if its import failed
    reason = cuda.refuses("rms_norm", GPU)
    assert reason is not None
    assert reason.startswith("the CUDA kernels are not built (")
    assert "PEARL_CUDA=1 pip install -e ." in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("op", cuda.OPERATORS)
def test_without_a_gpu_nothing_is_chosen_and_asking_for_it_is_an_error(op: str) -> None:
    (line,) = [line for line in explain(op, GPU) if line.provider == "cuda"]
    assert not line.chosen
    assert re.match(r"the CUDA kernels are not built|there is no NVIDIA driver|torch finds no CUDA device", line.reason)
    with pytest.raises(ValueError, match=rf"no provider 'cuda' can run {op} .*cuda: {re.escape(line.reason)}"):
        explain(op, GPU, {op: "cuda"})

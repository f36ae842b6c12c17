"""What is said about a device that cannot be used. torch.cuda answers what the test wants."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pearl.config import EngineConfig
from pearl.devices import check_device, require_supported_gpus
from pearl.engine import model_pair
from pearl.engine.model_loading import load_models
from pearl.errors import ConfigurationError

ABSENT = r"device 'cuda' was asked for, but torch sees no CUDA device; use device='cpu', or "
OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040).\nPlease update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx."
)


def answer(error: BaseException | None = None) -> Any:
    def call(*_: object) -> None:
        if error is not None:
            raise error

    return call


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch built for CUDA that finds no GPU, nobody knows why."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", answer())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU of the test")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 1 else (8, 0))


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigurationError) as error:
        EngineConfig(**options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("absent")
def test_torch_was_built_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "init", answer(AssertionError("Torch not compiled with CUDA enabled")))
    with pytest.raises(ConfigurationError, match=ABSENT + r"install a CUDA build of torch: .* was built for CPU"):
        check_device("cuda")


@pytest.mark.usefixtures("absent")
@pytest.mark.parametrize("visible", ["", "-1", " -1,0"])
def test_every_gpu_is_hidden(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigurationError, match=ABSENT + r"name a GPU in CUDA_VISIBLE_DEVICES or unset it") as error:
        check_device("cuda")
    assert repr(visible) in str(error.value)


@pytest.mark.usefixtures("absent")
def test_torch_says_why_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "init", answer(RuntimeError(OLD_DRIVER)))
    said = refusal(device="cuda")
    assert "make CUDA work: The NVIDIA driver on your system is too old (found version 11040). Please update" in said
    assert said.endswith("index.aspx")


@pytest.mark.usefixtures("absent")
def test_nobody_knows_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigurationError, match=ABSENT + r"check with nvidia-smi .* built for CUDA 13\.0"):
        check_device("cuda")


@pytest.mark.usefixtures("two_gpus")
def test_an_index_past_the_last_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert refusal(device="cuda:2") == "device 'cuda:2' was asked for, but there are 2, the last is 'cuda:1'"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert refusal(draft_device="cuda:4").endswith("the last is 'cuda:1' (CUDA_VISIBLE_DEVICES is '4,5')")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_older_than_the_kernels() -> None:
    require_supported_gpus([torch.device("cuda", 0), torch.device("cpu")])
    with pytest.raises(ConfigurationError) as error:
        require_supported_gpus([torch.device("cuda", 0), torch.device("cuda", 1)])
    assert str(error.value) == (
        "cuda:1 (GPU of the test) has compute capability 7.5, the kernels are compiled for 8.0 and newer; use "
        "device='cpu' or a newer GPU"
    )


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("options", [{"target_device": "cuda:1"}, {"draft_device": "cuda:1"}, {"target_parallel": 2}])
def test_it_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    monkeypatch.setattr(model_pair, "describe_model", None)
    with pytest.raises(ConfigurationError, match=r"cuda:1 .* compute capability 7\.5"):
        load_models(EngineConfig(**{"device": "cuda", **options}))


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", answer(RuntimeError("CUDA error: unknown\nerror.")))
    with pytest.raises(
        ConfigurationError, match=r"^cuda:0 cannot be used: CUDA error: unknown error; use device='cpu'"
    ):
        require_supported_gpus([torch.device("cuda", 0)])


def test_cuda_is_not_asked_where_nobody_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("is_available", "device_count", "init", "get_device_capability", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, answer(AssertionError(f"torch.cuda.{name} was called")))
    load_models(EngineConfig(device="cpu", max_num_seqs=1, max_model_len=32)).close()
    with pytest.raises(AssertionError, match="is_available was called"):
        EngineConfig(device="cuda")

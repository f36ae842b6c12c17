"""What there is to compute on: cores, and whether a device that was asked for can be used, and if not, why."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from pearl.errors import ConfigurationError

OLDEST_CAPABILITY = (8, 0)  # what the CUDA kernels need (csrc/cuda/ptx.cuh): Ampere


def cpu_cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(name: str | None) -> None:
    """``name`` as in EngineConfig.device; None and "auto" are fine. ConfigurationError for what is not there.

    CUDA is asked about only where it was asked for.
    """
    if name is None or name == "auto":
        return
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"unknown device {name!r}; use 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigurationError(f"device {name!r} is not supported; use 'cpu' or 'cuda'")
    if device.type == "cuda":
        _check_gpu(name, device.index or 0)


def require_supported_gpus(devices: Iterable[torch.device]) -> None:
    """ConfigurationError if a GPU among ``devices`` cannot be started, or is older than the kernels. Starts CUDA."""
    for device in devices:
        if device.type != "cuda":
            continue
        try:
            capability = torch.cuda.get_device_capability(device)
        except RuntimeError as error:
            raise ConfigurationError(f"{device} cannot be used: {_one_line(error)}; use device='cpu'") from error
        if capability < OLDEST_CAPABILITY:
            raise ConfigurationError(
                f"{device} ({torch.cuda.get_device_name(device)}) has compute capability {_dotted(capability)}, the "
                f"kernels are compiled for {_dotted(OLDEST_CAPABILITY)} and newer; use device='cpu' or a newer GPU"
            )


def _check_gpu(name: str, index: int) -> None:
    if not torch.cuda.is_available():
        raise ConfigurationError(
            f"device {name!r} was asked for, but torch sees no CUDA device; use device='cpu', or {_remedy()}"
        )
    there = torch.cuda.device_count()
    if index >= there:
        raise ConfigurationError(
            f"device {name!r} was asked for, but there are {there}, the last is 'cuda:{there - 1}'{_hidden()}"
        )


def _remedy() -> str:
    """What would make CUDA available, and why it is not."""
    if torch.version.cuda is None:
        return f"install a CUDA build of torch: this torch ({torch.__version__}) was built for CPU"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.split(",")[0].strip() in ("", "-1"):
        return f"name a GPU in CUDA_VISIBLE_DEVICES or unset it: it is {visible!r} and hides all"
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # what is_available keeps to itself
        return f"make CUDA work: {_one_line(error)}"
    return f"check with nvidia-smi that there is a GPU: torch is built for CUDA {torch.version.cuda} and finds none"


def _hidden() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"


def _one_line(error: BaseException) -> str:
    """torch's own sentence, which may be spread over lines, without its full stop."""
    return " ".join(str(error).split()).rstrip(".")


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))

"""``pearl info``: what runs here, and why."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Annotated

import typer

from pearl.cli.model_info import model_table
from pearl.cli.resident import resident
from pearl.cli.terminal import Terminal
from pearl.installed import DISTRIBUTION, installed_version

if TYPE_CHECKING:
    from rich.table import Table

    from pearl.config import EngineConfig

_LARGEST_HEAD = 1024
PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy")


def installed(package: str) -> str:
    return installed_version(package) or "not installed"


def info(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    head_dim: Annotated[int, typer.Option(min=1, max=_LARGEST_HEAD, help="Size of an attention head.")] = 64,
    model: Annotated[str | None, typer.Option(help="A model to describe instead: folder, hub id or GGUF file.")] = None,
) -> None:
    """Show versions, devices, threads, and which provider runs each operator and why the others do not.

    With --model: what is recognised in that model, or why it cannot be run.
    """
    import torch

    from pearl.config import EngineConfig
    from pearl_kernels import Situation
    from pearl_kernels.report.providers import provider_table, resolve

    config = EngineConfig(device=device, dtype=dtype)
    situation = Situation(
        config.resolve_device("target").type,
        config.torch_dtype or torch.bfloat16,
        head_dim,
        threads=config.resolve_threads()[1],
    )
    terminal = Terminal.open()
    if model is not None:
        terminal.out.print(model_table(model, situation.device, config.torch_dtype))
        return
    terminal.out.print(_machine_table(config))
    terminal.out.print(provider_table(situation, resolve(situation)))


def _machine_table(config: EngineConfig) -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    draft_threads, target_threads = config.resolve_threads()
    table.add_row("pearl", installed(DISTRIBUTION))
    table.add_row("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        table.add_row(package, installed(package))
    table.add_row("device", f"target on {config.resolve_device('target')}, draft on {config.resolve_device('draft')}")
    table.add_row("cuda", _cuda())
    alone = config.draft_threads_alone
    table.add_row("threads", f"target {target_threads}, draft {draft_threads} beside it, {alone} alone")
    table.add_row("memory", f"{resident() or 'unknown'}, without a model")
    return table


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        return f"not available (torch is built {f'for {torch.version.cuda}' if torch.version.cuda else 'without it'})"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{torch.version.cuda}: {', '.join(names)}"

"""``pearl plan``: which method and window a pair of models is expected to need, and whether drafting is worth it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from pearl.cli.grouping import spread
from pearl.cli.options import OutputOptions
from pearl.cli.terminal import Terminal
from pearl.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from pearl.planning import Costs, Forecast

_times = partial(typer.Option, rich_help_panel="Times, measured")
_models = partial(typer.Option, rich_help_panel="Times, from models and a GPU's data sheet")
_text = partial(typer.Option, rich_help_panel="Text and load")
_OTHERS = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class TimeOptions:
    """What forwards take here."""

    target_ms: Annotated[float | None, _times(help="A target's forward of one row.", show_default=False)] = None
    draft_ms: Annotated[float | None, _times(help="A step of the draft.", show_default=False)] = None
    row_ms: Annotated[float, _times(help="What each further row costs the target.")] = 0.0
    overhead_ms: Annotated[float, _times(help="Of a round, beside its forwards.")] = 0.0
    beside: Annotated[
        float, _times(min=1, help="How many times longer forwards take while both work; 1: on devices of their own.")
    ] = 1.0


@dataclass(frozen=True)
class ModelOptions:
    """Or what they should take there."""

    target: Annotated[str | None, _models(help="Hub id, path, or a shape: 1b, 8b, 32b, 70b.", show_default=False)] = (
        None
    )
    draft: Annotated[str | None, _models(help="Likewise.", show_default=False)] = None
    gpu: Annotated[
        str | None, _models(help="a100-80, h100, h200, ...; a wrong name lists all.", show_default=False)
    ] = None
    target_gpus: Annotated[int, _models(min=1, help="GPUs that share the target; the draft has one more.")] = 1
    bandwidth_share: Annotated[float, _models(help="What kernels reach of the data sheet's bandwidth.")] = 0.8


@dataclass(frozen=True)
class LoadOptions:
    """What is decoded."""

    acceptance: Annotated[float, _text(help="How often a drafted token holds.")] = 0.8
    prepared_hits: Annotated[
        float, _text(help="How often a rejection finds its window prepared (docs/algorithm.md).")
    ] = 0.0
    batch: Annotated[int, _text(min=1, help="Requests at once.")] = 1
    max_window: Annotated[int, _text(min=1, help="Longest window.")] = 16
    json: Annotated[bool, _text("--json", help="Print JSON.")] = False


@spread
def plan(*, times: TimeOptions, models: ModelOptions, load: LoadOptions, output: OutputOptions) -> None:
    """Say which method and window should be fastest, and by how much, without running anything.

    Give both --target-ms and --draft-ms, or --target, --draft and --gpu. The formulas are those of the automatic pace.
    """
    from pearl.planning import forecast

    costs = _costs(times, models)
    found = forecast(costs, load.acceptance, load.batch, load.max_window, load.prepared_hits)
    terminal = Terminal.open(output.no_color)
    if load.json:
        terminal.out.print_json(json.dumps({"ratio": costs.ratio, "forecasts": [asdict(one) for one in found]}))
        return
    terminal.out.print(
        f"target {costs.target(1.0) * 1e3:.3g} ms, a step of the draft {costs.step * 1e3:.3g} ms: "
        f"{costs.ratio:.1f} steps in a forward"
    )
    terminal.out.print(_methods_table(found))
    terminal.out.print(_verdict(found))
    terminal.out.print(_others_table(costs, load))


def _costs(times: TimeOptions, models: ModelOptions) -> Costs:
    from pearl.planning import Costs

    given = [models.target, models.draft, models.gpu]
    if times.target_ms is not None and times.draft_ms is not None and not any(given):
        return Costs.measured(
            times.target_ms / 1e3, times.row_ms / 1e3, times.draft_ms / 1e3, times.overhead_ms / 1e3, times.beside
        )
    if all(given) and times.target_ms is None and times.draft_ms is None:
        return _costs_of_models(models)
    raise ConfigurationError("give both --target-ms and --draft-ms, or --target, --draft and --gpu")


def _costs_of_models(models: ModelOptions) -> Costs:
    import torch

    from pearl.bench.shapes import SHAPES
    from pearl.heads import HEAD_NAMES, lone_head
    from pearl.models.backend import describe_model
    from pearl.models.weight_size import read_bytes, weight_bytes
    from pearl.planning import GPUS, costs_on

    gpu = GPUS.get(models.gpu or "")
    if gpu is None:
        raise ConfigurationError(f"--gpu {models.gpu}: known are {', '.join(GPUS)}")
    names = (models.target or "", models.draft or "")
    for name in names:
        if name not in SHAPES and (kind := lone_head(name)) is not None:
            raise ConfigurationError(
                f"{name!r} is {HEAD_NAMES[kind]}, whose steps are not planned from its size; give --target-ms and "
                "--draft-ms as measured"
            )
    target, draft = (SHAPES[name] if name in SHAPES else describe_model(name, "auto") for name in names)
    sizes = [weight_bytes(config, torch.bfloat16) for config in (target, draft)]
    return costs_on(
        gpu, sizes[0], sizes[1], models.target_gpus, models.bandwidth_share,
        target_reads=lambda rows: read_bytes(target, torch.bfloat16, rows),
        draft_reads=read_bytes(draft, torch.bfloat16),
    )  # fmt: skip


def _methods_table(found: Sequence[Forecast]) -> Table:
    from rich.table import Table

    table = Table("method", "window", "tok/s", "speedup", "tokens per target forward", box=None, pad_edge=False)
    for one in found:
        table.add_row(
            one.method, str(one.window or "-"), f"{one.tokens_per_second:.1f}", f"{one.speedup:.2f}x",
            f"{one.tokens_per_forward:.2f}",
        )  # fmt: skip
    return table


def _verdict(found: Sequence[Forecast]) -> str:
    best = max(found, key=lambda one: one.tokens_per_second)
    if best.mode == "autoregressive":
        return "Drafting is not worth it here: plain decoding should be fastest."
    turns = next(one for one in found if one.mode == "speculative")
    words = f"Fastest should be {best.method} with a window of {best.window}: {best.speedup:.2f} times plain decoding"
    if best is turns:
        return f"{words}; the overlap of PEARL brings nothing."
    return f"{words}, {best.tokens_per_second / turns.tokens_per_second:.2f} times taking turns."


def _others_table(costs: Costs, load: LoadOptions) -> Table:
    """At other acceptances: what a better or a worse draft would bring."""
    from rich.table import Table

    from pearl.planning import forecast

    table = Table("acceptance", box=None, pad_edge=False, title="speedup (window)", title_justify="left")
    rows = []
    for acceptance in _OTHERS:
        found = forecast(costs, acceptance, load.batch, load.max_window, load.prepared_hits)[1:]
        rows.append((f"{acceptance:.1f}", *(f"{one.speedup:.2f}x ({one.window})" for one in found)))
        names = [one.method for one in found]
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    return table

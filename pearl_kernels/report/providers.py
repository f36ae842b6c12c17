"""Which provider runs each operator in a situation, and why the others do not, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from pearl_kernels.provider import Situation
from pearl_kernels.registry import OPERATORS, Status, explain


def resolve(situation: Situation) -> dict[str, list[Status]]:
    """For each operator one line for each provider, in order of preference."""
    return {op: explain(op, situation) for op in OPERATORS}


def provider_table(situation: Situation, resolved: dict[str, list[Status]]) -> Table:
    dtype = str(situation.dtype).removeprefix("torch.")
    title = f"operators on {situation.device}, {dtype}, head_dim {situation.head_dim}"
    table = Table(title=title, title_justify="left")
    table.add_column("operator", no_wrap=True)
    table.add_column("provider", style="green", no_wrap=True)
    table.add_column("the others")
    for op, statuses in resolved.items():
        chosen = next(status.provider for status in statuses if status.chosen)
        table.add_row(op, chosen, "\n".join(_refusals(statuses)))
    return table


def _refusals(statuses: Sequence[Status]) -> list[str]:
    """One line a reason, with the providers that it holds for."""
    reasons: dict[str, list[str]] = {}
    for status in statuses:
        if not status.chosen:
            reasons.setdefault(status.reason, []).append(status.provider)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]

"""``pearl bench``: the throughput benchmark, which is imported when it is asked for."""

from __future__ import annotations

import typer

# Everything behind "bench", --help too, is for the command that it passes on to.
PASSES_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def bench(context: typer.Context) -> None:
    """Tokens per second of the decoding methods, interleaved, on the same prompts; medians."""
    from pearl.bench.command import benchmark
    from pearl.bench.throughput import throughput

    if code := benchmark(throughput)(context.args, prog_name=context.command_path, standalone_mode=False):
        raise typer.Exit(code)

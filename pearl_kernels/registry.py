"""Which provider runs which operator, and why the others do not.

An operator *is* its reference function (``pearl_kernels.reference``): name, arguments, meaning. A provider implements
some of the operators for some situations. ``select`` resolves all operators once, for one worker, into a
``KernelSet``; nothing is resolved, and nothing falls back, at call time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pearl_kernels import cpu, reference, triton

OPERATORS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        reference.rms_norm,
        reference.add_rms_norm,
        reference.silu_and_mul,
        reference.pack_linear,
        reference.linear,
        reference.rope_and_cache,
        reference.verify_attention,
        reference.sample,
        reference.verify,
        reference.copy_blocks,
    )
}


# One reads what the other makes: a preference for one of the two holds for both.
_PARTNERS: Mapping[str, str] = {"pack_linear": "linear", "linear": "pack_linear"}


@dataclass(frozen=True)
class Situation:
    """What a provider may make its support depend on."""

    device: str = "cpu"  # torch device type
    dtype: torch.dtype = torch.float32
    head_dim: int = 64
    threads: int = 1  # intra-op threads of the worker


@dataclass(frozen=True)
class Provider:
    """``operators`` by name; ``refuses(op, situation)`` is None, or the reason why the provider cannot run there."""

    name: str
    operators: Mapping[str, Callable[..., Any]]
    refuses: Callable[[str, Situation], str | None]


@dataclass(frozen=True)
class Status:
    op: str
    provider: str
    chosen: bool
    reason: str


@dataclass(frozen=True)
class KernelSet:
    """The operators of one worker. ``providers`` names the provider of each, for reports."""

    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    silu_and_mul: Callable[..., Any]
    pack_linear: Callable[..., Any]
    linear: Callable[..., Any]
    rope_and_cache: Callable[..., Any]
    verify_attention: Callable[..., Any]
    sample: Callable[..., Any]
    verify: Callable[..., Any]
    copy_blocks: Callable[..., Any]
    providers: Mapping[str, str]


# In order of preference. Importing a provider is cheap and never fails: what is missing is a reason, not an error.
PROVIDERS: tuple[Provider, ...] = (
    Provider("cpu", cpu.OPERATORS, cpu.refuses),
    Provider("triton", triton.OPERATORS, triton.refuses),
    Provider("reference", OPERATORS, lambda op, situation: None),
)


def explain(op: str, situation: Situation | None = None, prefer: Mapping[str, str] | None = None) -> list[Status]:
    """One line for each provider, in order of preference: chosen or not, and why.

    ``prefer`` maps an operator to the provider that must run it.
    Raises ValueError if the operator is unknown, or the preferred provider cannot run it.
    """
    if op not in OPERATORS:
        raise ValueError(f"unknown operator {op!r}; the operators are {', '.join(OPERATORS)}")
    situation = situation or Situation()
    prefer = prefer or {}
    wanted = prefer.get(op, prefer.get(_PARTNERS.get(op, op)))
    lines: list[Status] = []
    chosen: str | None = None
    for provider in PROVIDERS:
        implemented = op in provider.operators
        reason = (provider.refuses(op, situation) or "") if implemented else "does not implement it"
        runs = not reason and chosen is None and wanted in (None, provider.name)
        if runs:
            chosen = provider.name
            reason = "asked for" if wanted else "first that can run"
        elif not reason:
            reason = f"{wanted} was asked for" if wanted else f"{chosen} comes first"
        lines.append(Status(op, provider.name, runs, reason))
    if chosen is None:
        detail = "; ".join(f"{line.provider}: {line.reason}" for line in lines)
        raise ValueError(f"no provider {wanted!r} can run {op} on {situation}: {detail}")
    return lines


def select(situation: Situation | None = None, prefer: Mapping[str, str] | None = None) -> KernelSet:
    """Resolve every operator for ``situation``. ``prefer={"op": "provider"}`` pins one; errors as in ``explain``."""
    unknown = set(prefer or {}) - set(OPERATORS)
    if unknown:
        raise ValueError(f"unknown operators {sorted(unknown)}; the operators are {', '.join(OPERATORS)}")
    names = {op: next(s.provider for s in explain(op, situation, prefer) if s.chosen) for op in OPERATORS}
    by_name = {provider.name: provider for provider in PROVIDERS}
    return KernelSet(providers=names, **{op: by_name[name].operators[op] for op, name in names.items()})

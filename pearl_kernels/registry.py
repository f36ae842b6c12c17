"""Which provider runs which operator, and why the others do not.

An operator *is* its reference function (``pearl_kernels.reference``): name, arguments, meaning. A provider implements
some of the operators for some situations. ``select`` resolves all operators once, for one worker, into a
``KernelSet``; nothing is resolved, and nothing falls back, at call time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pearl_kernels import cpu, cuda, flash_attn, flashinfer, reference, triton
from pearl_kernels.provider import Provider, Situation

OPERATORS: Mapping[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        reference.rms_norm,
        reference.add_rms_norm,
        reference.silu_and_mul,
        reference.gelu_and_mul,
        reference.scale_and_cap,
        reference.pack_linear,
        reference.pack_quantized,
        reference.weight_rows,
        reference.linear,
        reference.route,
        reference.experts,
        reference.rope_and_cache,
        reference.verify_attention,
        reference.sample,
        reference.verify,
        reference.copy_blocks,
    )
}


# They read what the first makes: a preference for one of them holds for all.
_PARTNERS = ("pack_linear", "pack_quantized", "linear", "weight_rows", "experts")
# A provider that does not pack matrices itself reads another one's.
_READS: Mapping[str, str] = {"triton": "reference"}


@dataclass(frozen=True)
class Status:
    op: str
    provider: str
    chosen: bool
    reason: str


@dataclass(frozen=True)
class KernelSet:
    """The operators of one worker. ``providers`` names the provider of each, for reports.

    ``verify_numbers``: ``verify`` for index arrays in Python numbers, where the same provider has it; else None.
    """

    rms_norm: Callable[..., Any]
    add_rms_norm: Callable[..., Any]
    silu_and_mul: Callable[..., Any]
    gelu_and_mul: Callable[..., Any]
    scale_and_cap: Callable[..., Any]
    pack_linear: Callable[..., Any]
    pack_quantized: Callable[..., Any]
    weight_rows: Callable[..., Any]
    linear: Callable[..., Any]
    route: Callable[..., Any]
    experts: Callable[..., Any]
    rope_and_cache: Callable[..., Any]
    verify_attention: Callable[..., Any]
    sample: Callable[..., Any]
    verify: Callable[..., Any]
    copy_blocks: Callable[..., Any]
    providers: Mapping[str, str]
    verify_numbers: Callable[..., Any] | None = None


def _bind_reference(op: str, situation: Situation) -> Callable[..., Any]:
    if op == "pack_linear" and situation.weights != "full":
        return functools.partial(reference.pack_linear, weights=situation.weights)
    return OPERATORS[op]


# In order of preference, except where _AFTER says otherwise. Importing a provider is cheap and never fails: what is
# missing is a reason, not an error.
PROVIDERS: tuple[Provider, ...] = (
    Provider("cpu", cpu.OPERATORS, cpu.refuses, cpu.bind, cpu.VERIFY_NUMBERS),
    Provider("cuda", cuda.OPERATORS, cuda.refuses),
    Provider("triton", triton.OPERATORS, triton.refuses),
    Provider("flash_attn", flash_attn.OPERATORS, flash_attn.refuses, missing=flash_attn.missing),
    Provider("flashinfer", flashinfer.OPERATORS, flashinfer.refuses, missing=flashinfer.missing),
    Provider("reference", OPERATORS, lambda op, situation: None, _bind_reference),
)

# For one operator a provider may come right after another that it else comes before.
_AFTER: Mapping[str, Mapping[str, str]] = {
    "verify_attention": {"cuda": "triton"},  # made for few queries a sequence; Triton's kernel also for whole prompts
}


def preferred(op: str) -> list[Provider]:
    """All providers, in order of preference for ``op``."""
    names = [provider.name for provider in PROVIDERS]

    def rank(provider: Provider) -> tuple[int, bool]:
        earlier = _AFTER.get(op, {}).get(provider.name)
        return names.index(earlier if earlier in names else provider.name), earlier in names

    return sorted(PROVIDERS, key=rank)


def explain(op: str, situation: Situation | None = None, prefer: Mapping[str, str] | None = None) -> list[Status]:
    """One line for each provider, in order of preference: chosen or not, and why.

    ``prefer`` maps an operator to the provider that must run it.
    Raises ValueError if the operator is unknown, or the preferred provider cannot run it.
    """
    if op not in OPERATORS:
        raise ValueError(f"unknown operator {op!r}; the operators are {', '.join(OPERATORS)}")
    situation = situation or Situation()
    prefer = prefer or {}
    partners = (op, *_PARTNERS) if op in _PARTNERS else (op,)
    wanted = next((prefer[name] for name in partners if name in prefer), None)
    if len(partners) > 1 and wanted is not None and not any(p.name == wanted and op in p.operators for p in PROVIDERS):
        wanted = _READS.get(wanted, wanted)
    lines: list[Status] = []
    chosen: str | None = None
    for provider in preferred(op):
        implemented = op in provider.operators
        reason = (provider.refuses(op, situation) or "") if implemented else "does not implement it"
        runs = not reason and chosen is None and wanted in (None, provider.name)
        if runs:
            reason = provider.missing() or ""
            runs = not reason
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
    situation = situation or Situation()
    return KernelSet(
        providers=names,
        verify_numbers=by_name[names["verify"]].verify_numbers,
        **{op: by_name[name].for_worker(op, situation) for op, name in names.items()},
    )

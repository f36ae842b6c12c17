"""How the passes of ``sample`` and ``verify`` are launched: plan, memory, and the variants that this amounts to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pearl_kernels.reference import SamplingTensors, Stream
from pearl_kernels.triton.distribution import collect_kernel, settle_kernel
from pearl_kernels.triton.statistics import BINS, CAPACITY, GROUPS, TILE, TILES_AT, TOKENS_AT, scan_kernel
from pearl_kernels.triton.variants import Variant

WARPS = 4
_PROGRAMS = 2112  # sixteen for each of an H100's 132 multiprocessors: two rounds and a bit, so that none waits long
_MASS_BITS = 44  # of a mass's fraction: sums of 2**18 masses of at most 1 fit into 63 bits


@dataclass(frozen=True)
class Plan:
    """How programs share the tiles of each slot's row: it follows from shapes alone. Results do not depend on it."""

    slots: int
    vocab_size: int
    tiles_per_program: int

    @property
    def tiles(self) -> int:
        return -(-self.vocab_size // int(TILE.value))

    @property
    def grid(self) -> tuple[int, int]:
        return self.slots, -(-self.tiles // self.tiles_per_program)

    @property
    def span(self) -> int:
        return 1 << (self.tiles - 1).bit_length()

    @property
    def constants(self) -> dict[str, int]:
        """Of every kernel."""
        return {"TILES": self.tiles, "SPAN": self.span}

    @property
    def mass_bits(self) -> int:
        return min(_MASS_BITS, 62 - (self.vocab_size - 1).bit_length())


def make_plan(slots: int, vocab_size: int) -> Plan:
    whole = Plan(slots, vocab_size, 1)
    programs = min(whole.tiles, -(-_PROGRAMS // max(slots, 1)))
    return Plan(slots, vocab_size, -(-whole.tiles // programs))


@dataclass(frozen=True)
class Distributions:
    """What is known of each slot (see ``statistics.py``), and what is drawn already: of cut slots nothing is."""

    floats: Tensor
    ints: Tensor
    masses: Tensor
    tokens: Tensor  # int64 [slots]
    logprobs: Tensor  # fp32 [slots]


def distributions(
    plan: Plan,
    logits: Tensor,
    params: SamplingTensors,
    positions: Tensor | None = None,
    rows: Tensor | None = None,
    row_start: Tensor | None = None,
    stream: Stream = Stream.SAMPLE,
) -> Distributions:
    """Of ``plan.slots`` rows of logits, at least one; arguments as in ``statistics.scan_kernel``.

    Only where positions are given are uncut slots drawn; greedy slots always are.
    """
    slots = plan.slots
    floats = TILES_AT.value + (3 + GROUPS.value) * plan.span + CAPACITY.value
    made = Distributions(
        logits.new_empty((slots, floats), dtype=torch.float32),
        logits.new_empty((slots, TOKENS_AT.value + plan.span + BINS.value), dtype=torch.int32),
        logits.new_empty((slots, BINS.value), dtype=torch.int64),
        logits.new_empty(slots, dtype=torch.int64),
        logits.new_empty(slots, dtype=torch.float32),
    )
    records = made.floats, made.ints, made.masses
    size = logits.stride(0), plan.vocab_size, plan.tiles_per_program
    parameters = params.temperature, params.top_k, params.top_p, params.min_p, params.seed, positions
    requests = 0 if row_start is None else row_start.shape[0] - 1
    fixed = {**plan.constants, "num_warps": WARPS}
    scan_kernel[plan.grid](logits, rows, row_start, *parameters, *records, *size, requests, int(stream), **fixed)
    fixed["MASS_BITS"] = plan.mass_bits
    settle_kernel[plan.grid](logits, *records, made.tokens, made.logprobs, *size, **fixed)
    collect_kernel[plan.grid](logits, *records, *size, **fixed)
    return made


_VOCAB_SIZE = 128256  # of Llama 3
_INTEGERS = ("stride", "draft_stride", "vocab_size", "tiles_per_program", "requests", "stream", "draft_count")
_EVEN = _INTEGERS[:3]  # multiples of 16 in production, and specialised on it
_POINTERS = {  # but for those to logits and to fp32
    "*i32": "rows row_start top_k ints draft_rows accepted failed failed_draft finished draft_ints winners",
    "*i64": "seed positions masses tokens draft_tokens drawn next_token draft_drawn alternatives",
}


def variant(
    name: str, kernel: Any, dtype: str, constants: Mapping[str, object] | None = None, num_warps: int = WARPS
) -> Variant:
    """A kernel of ``sample`` or ``verify`` as launched for logits of this dtype. constants: besides the plan's."""
    plan = make_plan(1, _VOCAB_SIZE)
    constants = {**plan.constants, "MASS_BITS": plan.mass_bits, **(constants or {})}
    types = {argument: kind for kind, arguments in _POINTERS.items() for argument in arguments.split()}
    types |= {"logits": f"*{dtype}", "draft_logits": f"*{dtype}"} | dict.fromkeys(_INTEGERS, "i32")
    signature = {a: "constexpr" if a in constants else types.get(a, "*fp32") for a in kernel.arg_names}
    return Variant(
        name,
        kernel,
        signature,
        {argument: constants[argument] for argument, kind in signature.items() if kind == "constexpr"},
        num_warps=num_warps,
        aligned=tuple(a for a, kind in signature.items() if kind[0] == "*" or (kind == "i32" and a in _EVEN)),
    )

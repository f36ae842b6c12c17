"""``experts`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.experts``.

A meeting is a row and one of its experts. Meetings are sorted by expert and cut into tiles of 16 rows of one expert,
the fewest that tensor cores multiply: up to 16 meetings a program reads its columns of the expert's matrix once, so a
decoding step or a verification window passes over each chosen expert once, and nothing of the others is read. Weights
are the bytes that count: matrices of few bits stay as they are in memory (``weight_tile``). Every product has the same
tile, whatever the number of rows, and adds up its inputs in the same order: a row's result does not depend on the rows
beside it.

How many tiles there are depends on the routing, which the host does not wait for: the grid has as many as there can be,
and programs without a tile end at once. So all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from pearl_kernels.checks import matrix
from pearl_kernels.operands import check_experts
from pearl_kernels.reference import ExpertWeights, LinearWeight, Routing
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.experts_kernels import combine_kernel, down_kernel, gate_up_kernel
from pearl_kernels.triton.variants import Variant
from pearl_kernels.triton.weight_tile import FP8, INT4, INT8, MOST, PLAIN, block_of, kind_of

_ROWS = 16  # of a tile
_COLUMNS = 64  # of few bits half of them, and of fp32, which is multiplied without tensor cores and would spill
_WARPS, _STAGES = 4, 3
_COMBINED = 1024  # columns of a program that adds up


@dataclass(frozen=True)
class _Groups:
    """Meetings by expert; see ``gate_up_kernel``. ``most``: tiles that there can be."""

    order: Tensor
    starts: Tensor
    tiles: Tensor
    most: int


def _group(experts: Tensor, count: int) -> _Groups:
    order = experts.flatten().sort(stable=True)
    starts = torch.searchsorted(order.values, torch.arange(count + 1, device=experts.device, dtype=torch.int32))
    tiles = ((starts.diff() + _ROWS - 1) // _ROWS).cumsum(0)
    meetings = experts.numel()
    most = min(count, meetings) + meetings // _ROWS  # a tile that is not full for each expert, and the full ones
    return _Groups(order.indices.int(), starts.int(), tiles.int(), most)


def experts(
    x: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
) -> Tensor:
    """As the reference. Numbers of experts that are out of range are not looked for: it would wait for the device."""
    for name, stack in (("gate_up", weights.gate_up), ("down", weights.down)):
        if stack.data.dim() != 3:
            raise ValueError("experts: weights must be stacks of this provider's pack_linear or pack_quantized")
        if stack.scale is not None and stack.group == 0:
            raise ValueError(f"experts: {name} is int8 by outputs, which the Triton kernel does not multiply")
    top_k = check_experts(CHECKS, x, routing, weights, shared, shared_gate)
    (n, width), hidden, count, unit = matrix("experts", x), weights.down.in_features, weights.count, weights.unit
    out = torch.empty_like(x)
    if not out.numel():
        return out
    groups = _group(routing.experts, count)
    indices = groups.order, groups.starts, groups.tiles
    activated, made = x.new_empty((n * top_k, hidden)), x.new_empty((n * top_k, width))
    sizes = {"HIDDEN": hidden, "WIDTH": width, "EXPERTS": triton.next_power_of_2(count)}
    up, down = _tile(weights.gate_up, x.dtype), _tile(weights.down, x.dtype)
    gate_up_kernel[(triton.cdiv(hidden, up["COLUMNS"]), groups.most)](
        x, *_tensors(weights.gate_up), weights.gate_up_bias, *indices, activated, count, top_k,
        *_lines(weights.gate_up), unit.gain, unit.limit, unit.offset, **sizes, **up, num_warps=_WARPS,
        num_stages=_STAGES,
    )  # fmt: skip
    down_kernel[(triton.cdiv(width, down["COLUMNS"]), groups.most)](
        activated, *_tensors(weights.down), weights.down_bias, *indices, made, count, *_lines(weights.down),
        **sizes, **down, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    combine_kernel[(triton.cdiv(width, _COMBINED), n)](
        made, routing.weights, shared, shared_gate, out, width, TOP_K=top_k, BLOCK=_COMBINED, num_warps=4
    )
    return out


def _tensors(stack: LinearWeight) -> tuple[Tensor | None, ...]:
    return stack.data, stack.scale, stack.offset


def _lines(stack: LinearWeight) -> tuple[int, int]:
    """Elements of an output, inputs of a group."""
    return stack.data.shape[2], stack.group


def _tile(stack: LinearWeight, dtype: torch.dtype) -> dict[str, int]:
    return _tile_of(kind_of(stack), block_of(stack) if stack.group else MOST, dtype)


def _tile_of(kind: int, block: int, dtype: torch.dtype) -> dict[str, int]:
    """``block``: inputs that a group is whole ones of."""
    plain, wide = kind == PLAIN.value, dtype == torch.float32
    return {
        "KIND": kind,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS if plain and not wide else _COLUMNS // 2,
        "INPUTS": min(block, MOST // 2) if wide or kind == INT8.value else block,  # more int8 spills on sm_100
    }


_TYPES = {"weight": "*u8", "scale": "*fp32", "offset": "*fp32", "order": "*i32", "starts": "*i32", "tiles": "*i32"}
_SIZES = ("experts", "top_k", "width", "line", "group")


def _variant(name: str, kernel: Any, dtype: str, types: dict[str, str], constants: dict[str, object]) -> Variant:
    """``types``: of arguments that are no pointers to numbers of ``dtype``."""

    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in ("gain", "limit", "extra"):
            return "fp32"
        return "i32" if argument in _SIZES else types.get(argument, f"*{dtype}")

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    aligned = tuple(a for a, k in signature.items() if k[0] == "*" or a in ("width", "line", "group"))
    return Variant(f"{name}-{dtype}", kernel, signature, constants, num_warps=_WARPS, aligned=aligned)


_CODES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MIXTRAL, _QWEN3 = (14336, 4096, 8), (768, 2048, 128)  # hidden, width, experts of 8x7B and of 30B-A3B
# Name, shape, dtype, kind, block of inputs, offsets, biases (gpt-oss's).
_PRODUCTS = (
    ("mixtral", _MIXTRAL, "bf16", PLAIN, MOST, False, False),
    ("qwen3", _QWEN3, "bf16", PLAIN, MOST, False, True),
    ("mixtral", _MIXTRAL, "fp16", PLAIN, MOST, False, False),
    ("mixtral", _MIXTRAL, "fp32", PLAIN, MOST, False, False),
    ("mixtral-int4-128-offsets", _MIXTRAL, "fp16", INT4, MOST, True, False),
    ("qwen3-int4-32", _QWEN3, "bf16", INT4, 32, False, True),
    ("mixtral-int8-128", _MIXTRAL, "bf16", INT8, MOST, False, False),
    ("qwen3-fp8-128", _QWEN3, "bf16", FP8, MOST, False, False),
)


def _variants() -> tuple[Variant, ...]:
    made = []
    for name, (hidden, width, count), dtype, kind, block, offsets, biases in _PRODUCTS:
        sizes = {"HIDDEN": hidden, "WIDTH": width, "EXPERTS": triton.next_power_of_2(count)}
        plain = kind is PLAIN
        absent = {"scale": plain, "offset": not offsets, "bias": not biases}
        constants: dict[str, object] = {**sizes, **_tile_of(kind.value, block, _CODES[dtype])}
        constants |= {argument: None for argument, is_absent in absent.items() if is_absent}
        types = {a: k for a, k in _TYPES.items() if not (plain and a == "weight")}
        made.append(_variant(f"gate_up-{name}", gate_up_kernel, dtype, types, constants))
        made.append(_variant(f"down-{name}", down_kernel, dtype, types, constants))
    weights = {"weights": "*fp32"}
    alone: dict[str, object] = {"TOP_K": 8, "BLOCK": _COMBINED, "shared": None, "shared_gate": None}
    made.append(_variant("combine", combine_kernel, "bf16", weights, alone))
    made.append(_variant("combine-shared", combine_kernel, "bf16", weights, {"TOP_K": 4, "BLOCK": _COMBINED}))
    return tuple(made)


VARIANTS = _variants()

"""``route`` and ``experts`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.experts``.

A meeting is a row and one of its experts. Meetings are sorted by expert and cut into tiles of 16 rows of one expert,
the fewest that tensor cores multiply: up to 16 meetings a program reads its columns of the expert's matrix once, so a
decoding step or a verification window passes over each chosen expert once, and nothing of the others is read. Weights
are the bytes that count. Every product has the same tile, whatever the number of rows, and adds up its inputs in the
same order: a row's result does not depend on the rows beside it.

How many tiles there are depends on the routing, which the host does not wait for: the grid has as many as there can be,
and programs without a tile end at once. So all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels.checks import matrix
from pearl_kernels.operands import check_experts, check_route
from pearl_kernels.reference import ExpertWeights, Routing
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.variants import Variant

_ROWS = 16  # of a tile
_COLUMNS, _INPUTS = 64, 128  # of fp32 half of each: it is multiplied without tensor cores, and would spill registers
_WARPS, _STAGES = 4, 3
_COMBINED = 1024  # columns of a program that adds up
_MAX_EXPERTS = 4096


@triton.jit
def route_kernel(logits, chosen, weights, stride, experts, TOP_K: tl.constexpr, RENORMALISE: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Program r: row r of logits ``[N, experts]``; chosen and weights ``[N, TOP_K]``."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK)
    inside = number < experts
    score = tl.load(logits + row * stride + number, inside, float("-inf")).to(tl.float32)
    nan = tl.max((score != score).to(tl.int32), 0) > 0
    score = tl.where(score == score, score, float("-inf"))
    peak = tl.max(score, 0)
    everything = tl.sum(tl.where(inside, tl.exp(score - peak), 0.0), 0)
    among = 0.0
    rest = inside
    for _ in range(TOP_K):
        best = tl.max(tl.where(rest, score, float("-inf")), 0)
        first = tl.min(tl.where(rest & (score == best), number, BLOCK), 0)
        rest = rest & (number != first)
        among += tl.exp(best - peak)
    total = among if RENORMALISE else everything
    rest = inside
    for place in range(TOP_K):
        best = tl.max(tl.where(rest, score, float("-inf")), 0)
        first = tl.min(tl.where(rest & (score == best), number, BLOCK), 0)
        rest = rest & (number != first)
        weight = tl.where(nan, float("nan"), tl.exp(best - peak) / total)
        tl.store(chosen + row * TOP_K + place, first)
        tl.store(weights + row * TOP_K + place, weight)


@triton.jit
def _find(starts, tiles, experts, tile, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """The expert of a tile, and the tile's first meeting and their end; an expert past the last if there is no tile."""
    number = tl.arange(0, EXPERTS)
    ends = tl.load(tiles + number, number < experts, 2147483647)  # tiles up to and with each expert's
    expert = tl.sum((ends <= tile).to(tl.int32), 0)
    there = expert < experts
    before = tl.load(tiles + expert - 1, there & (expert > 0), 0)
    begin = tl.load(starts + expert, there, 0) + (tile - before) * ROWS
    return expert, begin, tl.load(starts + expert + 1, there, 0)


@triton.jit
def gate_up_kernel(
    x,  # [N, WIDTH]
    weight,  # [experts, 2 * HIDDEN, WIDTH]
    bias,  # [experts, 2 * HIDDEN] or None
    order,  # [meetings], by expert: meeting m is row m // top_k
    starts,  # [experts + 1]: of each expert's meetings in order
    tiles,  # [experts]: of all experts up to each
    out,  # [meetings, HIDDEN], in order
    experts,
    top_k,
    gain,
    limit,
    offset,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Program (c, t): columns c of tile t's gates and ups, multiplied side by side, and their unit."""
    expert, begin, end = _find(starts, tiles, experts, tl.program_id(1), ROWS, EXPERTS)
    if expert >= experts:
        return
    dtype: tl.constexpr = out.dtype.element_ty
    places = begin + tl.arange(0, ROWS)
    live = places < end
    rows = (tl.load(order + places, live, 0) // top_k).to(tl.int64)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < HIDDEN
    lanes = tl.arange(0, INPUTS)
    gates = expert.to(tl.int64) * (2 * HIDDEN) + columns
    left = x + rows[:, None] * WIDTH + lanes[None, :]
    right = weight + gates[None, :] * WIDTH + lanes[:, None]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin_input in range(0, WIDTH, INPUTS):
        there = lanes < WIDTH - begin_input
        a = tl.load(left + begin_input, live[:, None] & there[None, :], 0.0)
        wanted = inside[None, :] & there[:, None]
        gate = tl.dot(a, tl.load(right + begin_input, wanted, 0.0), gate, input_precision="ieee")
        up = tl.dot(a, tl.load(right + HIDDEN * WIDTH + begin_input, wanted, 0.0), up, input_precision="ieee")
    if bias is not None:
        gate += tl.load(bias + gates, inside, 0.0).to(tl.float32)[None, :]
        up += tl.load(bias + HIDDEN + gates, inside, 0.0).to(tl.float32)[None, :]
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)  # as if they were stored
    gate = tl.where(gate > limit, limit, gate)  # a NaN stays one
    up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    value = gate / (1.0 + tl.exp(-gain * gate)) * (up + offset)
    tl.store(out + places[:, None].to(tl.int64) * HIDDEN + columns[None, :], value.to(dtype),
             live[:, None] & inside[None, :])  # fmt: skip


@triton.jit
def down_kernel(
    x,  # [meetings, HIDDEN], in order
    weight,  # [experts, WIDTH, HIDDEN]
    bias,  # [experts, WIDTH] or None
    order,
    starts,
    tiles,
    out,  # [meetings, WIDTH], as they were before they were sorted
    experts,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INPUTS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Program (c, t): columns c of tile t."""
    expert, begin, end = _find(starts, tiles, experts, tl.program_id(1), ROWS, EXPERTS)
    if expert >= experts:
        return
    places = begin + tl.arange(0, ROWS)
    live = places < end
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < WIDTH
    lanes = tl.arange(0, INPUTS)
    outputs = expert.to(tl.int64) * WIDTH + columns
    left = x + places[:, None].to(tl.int64) * HIDDEN + lanes[None, :]
    right = weight + outputs[None, :] * HIDDEN + lanes[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin_input in range(0, HIDDEN, INPUTS):
        there = lanes < HIDDEN - begin_input
        a = tl.load(left + begin_input, live[:, None] & there[None, :], 0.0)
        b = tl.load(right + begin_input, inside[None, :] & there[:, None], 0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + outputs, inside, 0.0).to(tl.float32)[None, :]
    rows = tl.load(order + places, live, 0).to(tl.int64)
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], total.to(out.dtype.element_ty),
             live[:, None] & inside[None, :])  # fmt: skip


@triton.jit
def combine_kernel(made, weights, shared, shared_gate, out, width, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    """Program (c, r): columns c of row r; made ``[N * TOP_K, width]``."""
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    total = tl.zeros((BLOCK,), tl.float32)
    if shared is not None:
        gate = tl.load(shared_gate + row).to(tl.float32)
        total = tl.load(shared + row * width + columns, inside, 0.0).to(tl.float32) / (1.0 + tl.exp(-gate))
    for place in range(TOP_K):
        meeting = row * TOP_K + place
        part = tl.load(made + meeting * width + columns, inside, 0.0).to(tl.float32)
        total += tl.load(weights + meeting) * part
    tl.store(out + row * width + columns, total.to(out.dtype.element_ty), inside)


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


def route(logits: Tensor, top_k: int, renormalise: bool) -> Routing:
    n, count, _, stride = check_route(CHECKS, logits, top_k)
    if count > _MAX_EXPERTS:
        raise ValueError(f"route: logits must be of at most {_MAX_EXPERTS} experts, not {count}")
    made = Routing(logits.new_empty((n, top_k), dtype=torch.int32), logits.new_empty((n, top_k), dtype=torch.float32))
    if n:
        block = triton.next_power_of_2(count)
        route_kernel[(n,)](
            logits, *made, stride, count, TOP_K=top_k, RENORMALISE=renormalise, BLOCK=block, num_warps=1
        )  # fmt: skip
    return made


def experts(
    x: Tensor,
    routing: Routing,
    weights: ExpertWeights,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
) -> Tensor:
    """As the reference. Numbers of experts that are out of range are not looked for: it would wait for the device."""
    if weights.gate_up.data.dim() != 3 or weights.down.data.dim() != 3:
        raise ValueError("experts: weights must be stacks of the reference's pack_linear")
    if weights.gate_up.scale is not None or weights.down.scale is not None:
        raise ValueError("experts: quantised weights are not what the Triton kernel multiplies")
    top_k = check_experts(CHECKS, x, routing, weights, shared, shared_gate)
    (n, width), hidden, count, unit = matrix("experts", x), weights.down.in_features, weights.count, weights.unit
    out = torch.empty_like(x)
    if not out.numel():
        return out
    groups = _group(routing.experts, count)
    indices = groups.order, groups.starts, groups.tiles
    activated, made = x.new_empty((n * top_k, hidden)), x.new_empty((n * top_k, width))
    sizes = _sizes(x.dtype, hidden, width, count)
    gate_up_kernel[(triton.cdiv(hidden, sizes["COLUMNS"]), groups.most)](
        x, weights.gate_up.data, weights.gate_up_bias, *indices, activated, count, top_k,
        unit.gain, unit.limit, unit.offset, **sizes, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    down_kernel[(triton.cdiv(width, sizes["COLUMNS"]), groups.most)](
        activated, weights.down.data, weights.down_bias, *indices, made, count,
        **sizes, num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
    combine_kernel[(triton.cdiv(width, _COMBINED), n)](
        made, routing.weights, shared, shared_gate, out, width, TOP_K=top_k, BLOCK=_COMBINED, num_warps=4
    )
    return out


def _sizes(dtype: torch.dtype, hidden: int, width: int, count: int) -> dict[str, int]:
    part = dtype.itemsize // 2
    return {
        "HIDDEN": hidden,
        "WIDTH": width,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMNS // part,
        "INPUTS": _INPUTS // part,
        "EXPERTS": triton.next_power_of_2(count),
    }


_TYPES = {"chosen": "*i32", "order": "*i32", "starts": "*i32", "tiles": "*i32", "weights": "*fp32"}
_FLOATS = ("gain", "limit", "offset")


def _variant(name: str, kernel: Any, dtype: str, constants: dict[str, object], warps: int = 4) -> Variant:
    def kind(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument in _FLOATS:
            return "fp32"
        if argument in ("stride", "experts", "top_k", "width"):
            return "i32"
        return _TYPES.get(argument, f"*{dtype}")

    signature = {argument: kind(argument) for argument in kernel.arg_names}
    aligned = tuple(a for a, k in signature.items() if k[0] == "*" or a in ("stride", "width"))
    return Variant(f"{name}-{dtype}", kernel, signature, constants, num_warps=warps, aligned=aligned)


def _variants() -> tuple[Variant, ...]:
    """Of Mixtral-8x7B and of Qwen3-30B-A3B; biases are gpt-oss's."""
    made = []
    for name, (hidden, width, count), dtype, bias in (
        ("mixtral", (14336, 4096, 8), torch.bfloat16, False),
        ("qwen3", (768, 2048, 128), torch.bfloat16, True),
        ("mixtral", (14336, 4096, 8), torch.float16, False),
        ("mixtral", (14336, 4096, 8), torch.float32, False),
    ):
        sizes: dict[str, object] = {**_sizes(dtype, hidden, width, count), **({} if bias else {"bias": None})}
        code = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        made.append(_variant(f"gate_up-{name}", gate_up_kernel, code, sizes))
        made.append(_variant(f"down-{name}", down_kernel, code, sizes))
    alone: dict[str, object] = {"shared": None, "shared_gate": None}
    made.append(_variant("combine", combine_kernel, "bf16", {"TOP_K": 8, "BLOCK": _COMBINED, **alone}))
    made.append(_variant("combine-shared", combine_kernel, "bf16", {"TOP_K": 4, "BLOCK": _COMBINED}))
    routing: dict[str, object] = {"TOP_K": 8, "RENORMALISE": True, "BLOCK": 128}
    made.append(_variant("route-128", route_kernel, "bf16", routing, warps=1))
    return tuple(made)


VARIANTS = _variants()

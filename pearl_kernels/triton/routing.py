"""``route`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.experts``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels.operands import check_route
from pearl_kernels.reference import Routing
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.variants import Variant

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


def _variant(dtype: str, experts: int, top_k: int) -> Variant:
    constants = {"TOP_K": top_k, "RENORMALISE": True, "BLOCK": experts}
    types = {"logits": f"*{dtype}", "chosen": "*i32", "weights": "*fp32"}
    names = route_kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = ("logits", "chosen", "weights", "stride")
    return Variant(f"route-{experts}-{dtype}", route_kernel, signature, constants, num_warps=1, aligned=aligned)


VARIANTS = tuple(_variant(dtype, 128, 8) for dtype in ("bf16", "fp16"))

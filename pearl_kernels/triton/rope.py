"""``rope_and_cache`` in Triton; meaning, shapes and dtypes as in ``pearl_kernels.reference.layers``.

One pass: a program takes a tile of heads of one token, of q or of k and v. Both halves of a head are in registers
before either is written, so q may be rotated in place. Every element is read and written once, for three operations:
bandwidth is the limit, launch latency for the few tokens of a decoding step.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pearl_kernels.operands import check_rope
from pearl_kernels.triton import CHECKS
from pearl_kernels.triton.variants import Variant

_TILE = 512  # lanes of one half of the heads of a program


@triton.jit
def _norm_and_rotate(source, target, norm, cos_sin, position, heads, lanes, inside, kept, HEAD_DIM: tl.constexpr, eps):
    """Heads ``[.., HEAD_DIM]`` from source to target, where kept. heads ``[H, 1]``; lanes ``[1, L]`` of the first half.

    The norm, where there is one, rounds its result before the rotation, as the unfused operators would.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype: tl.constexpr = target.dtype.element_ty
    offsets = heads * HEAD_DIM + lanes
    first = tl.load(source + offsets, inside, 0.0).to(tl.float32)
    second = tl.load(source + HALF + offsets, inside, 0.0).to(tl.float32)
    column = tl.broadcast_to(lanes, offsets.shape)  # a thread loads its own angles: none pass through shared memory
    angles = cos_sin + position * HEAD_DIM + column
    cos = tl.load(angles, inside, 0.0)
    sin = tl.load(angles + HALF, inside, 0.0)
    if norm is not None:
        factor = tl.rsqrt(tl.sum(first * first + second * second, 1, keep_dims=True) / HEAD_DIM + eps)
        first_scale = tl.load(norm + column, inside, 0.0).to(tl.float32)
        second_scale = tl.load(norm + HALF + column, inside, 0.0).to(tl.float32)
        first = (first * factor * first_scale).to(dtype).to(tl.float32)
        second = (second * factor * second_scale).to(dtype).to(tl.float32)
    tl.store(target + offsets, (first * cos - second * sin).to(dtype), kept)
    tl.store(target + HALF + offsets, (second * cos + first * sin).to(dtype), kept)


@triton.jit
def rope_and_cache_kernel(
    q,  # [N, query_heads, HEAD_DIM]
    k,  # [N, kv_heads, HEAD_DIM]
    v,
    positions,  # [N]
    cos_sin,  # [max_position, HEAD_DIM]
    k_cache,  # [slots, kv_heads, HEAD_DIM]
    v_cache,
    slot_mapping,  # [N]
    q_norm,  # [HEAD_DIM] or None
    k_norm,
    q_stride,
    k_stride,
    v_stride,
    query_heads,
    kv_heads,
    query_tiles,
    eps,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Program (n, t): token n; tile t of HEADS query heads, or tile ``t - query_tiles`` of KV heads."""
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    lanes = tl.arange(0, LANES)[None, :]
    position = tl.load(positions + token)
    if tile < query_tiles:
        heads = tile * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (heads < query_heads) & (lanes < HALF)
        q_row = q + token * q_stride
        _norm_and_rotate(q_row, q_row, q_norm, cos_sin, position, heads, lanes, inside, inside, HEAD_DIM, eps)
    else:
        heads = (tile - query_tiles) * HEADS + tl.arange(0, HEADS)[:, None]
        inside = (heads < kv_heads) & (lanes < HALF)
        slot = tl.load(slot_mapping + token)  # negative: nothing is kept
        kept = (heads < tl.where(slot >= 0, kv_heads, 0)) & (lanes < HALF)
        entry = slot * kv_heads * HEAD_DIM
        values = v + token * v_stride + heads * HEAD_DIM + lanes
        first, second = tl.load(values, inside), tl.load(values + HALF, inside)
        k_row = k + token * k_stride
        _norm_and_rotate(k_row, k_cache + entry, k_norm, cos_sin, position, heads, lanes, inside, kept, HEAD_DIM, eps)
        target = v_cache + entry + heads * HEAD_DIM + lanes
        tl.store(target, first, kept)
        tl.store(target + HALF, second, kept)


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    tensors = q, k, v, positions, cos_sin, k_cache, v_cache, slot_mapping, q_norm, k_norm
    n, query_heads, kv_heads, head_dim = check_rope(CHECKS, *tensors)[:4]
    heads, lanes, warps = _tile(max(query_heads, kv_heads), head_dim)
    query_tiles = triton.cdiv(query_heads, heads)
    grid = n, query_tiles + triton.cdiv(kv_heads, heads)
    strides = q.stride(0), k.stride(0), v.stride(0)
    shape = {"HEAD_DIM": head_dim, "HEADS": heads, "LANES": lanes}
    if n:
        rope_and_cache_kernel[grid](
            *tensors, *strides, query_heads, kv_heads, query_tiles, eps, **shape, num_warps=warps
        )


def _tile(heads: int, head_dim: int) -> tuple[int, int, int]:
    """HEADS, LANES and the warps that leave a thread 8 lanes of each half: a vector of bf16."""
    lanes = triton.next_power_of_2(head_dim // 2)
    tile = min(_TILE // lanes, triton.next_power_of_2(heads))
    return tile, lanes, max(tile * lanes // (32 * 8), 1)


def _variant(dtype: str, head_dim: int, normed: bool) -> Variant:
    heads, lanes, warps = _tile(32, head_dim)
    tensors = dict.fromkeys(("q", "k", "v", "k_cache", "v_cache"), f"*{dtype}")
    norms = dict.fromkeys(("q_norm", "k_norm"), f"*{dtype}" if normed else "constexpr")
    indices = {"positions": "*i64", "cos_sin": "*fp32", "slot_mapping": "*i64"}
    sizes = dict.fromkeys(("q_stride", "k_stride", "v_stride", "query_heads", "kv_heads", "query_tiles"), "i32")
    shape: dict[str, object] = {"HEAD_DIM": head_dim, "HEADS": heads, "LANES": lanes}
    types = {**tensors, **indices, **norms, **sizes, "eps": "fp32", **dict.fromkeys(shape, "constexpr")}
    return Variant(
        name=f"rope_and_cache-{dtype}-{head_dim}{'-qk_norm' if normed else ''}",
        kernel=rope_and_cache_kernel,
        signature={name: types[name] for name in rope_and_cache_kernel.arg_names},
        constexprs=shape if normed else {**shape, **dict.fromkeys(norms)},
        num_warps=warps,
        aligned=(*tensors, *indices, *(norms if normed else ()), "q_stride", "k_stride", "v_stride"),
    )


VARIANTS = tuple(
    _variant(dtype, head_dim, normed)
    for dtype, head_dim, normed in (
        ("bf16", 64, False),
        ("bf16", 128, False),
        ("bf16", 128, True),
        ("fp16", 128, False),
    )
)

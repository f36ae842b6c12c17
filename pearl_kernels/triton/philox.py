"""Counter-based randomness on the device, bit for bit that of ``pearl_kernels.reference.philox`` up to the uniforms.

A draw is an exponential race: token t arrives at ``E_t / w_t``, E_t standard exponential, and the first to arrive wins.
With ``w = exp(z)`` that is the reference's ``argmax(z - log E)``, without a logarithm of E for each token.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _to_uniform(bits):
    """32 random bits to fp32 in the open interval (0, 1); every operation rounds once, as in the reference."""
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)


@triton.jit
def uniform(seed, positions, stream):
    """fp32, shaped as positions (int64, below 2**32): word 0 of block 0. seed: one int64, any 64-bit pattern."""
    position = positions.to(tl.uint32)
    zero = position * 0
    word, _, _, _ = tl.philox(seed, position, zero + stream, zero, zero)
    return _to_uniform(word)


@triton.jit
def uniforms(seed, position, stream, first, TILE: tl.constexpr):
    """fp32 [TILE]: of the tokens from ``first``, a multiple of 4. Token t has word ``t % 4`` of block ``t // 4``."""
    block = (first // 4 + tl.arange(0, TILE // 4)).to(tl.uint32)
    zero = block * 0
    a, b, c, d = tl.philox(seed, zero + position.to(tl.uint32), zero + stream, block, zero)
    return _to_uniform(tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [TILE]))  # a, b, c, d of each block in turn


@triton.jit
def _minus_log(v):
    """-log(v) of fp32 in (0, 1), no denormals, within one unit in the last place.

    ``v = 2**e (1 + f)``, ``1 + f`` in [sqrt(1/2), sqrt(2)), and ``log(1 + f) = f - f**2 / 2 + f**3 P(f)`` with P the
    polynomial of degree 6 that has the least relative error (3e-8). Triton's log also handles what cannot occur here,
    in nearly twice as many instructions; it would be a third of a draw.
    """
    bits = v.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000  # e, shifted to where it is in v
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = 0.08700367808
    p = p * f - 0.14267489314
    p = p * f + 0.14914789796
    p = p * f - 0.16577585042
    p = p * f + 0.19963061810
    p = p * f - 0.25001338124
    p = p * f + 0.33333909512
    return -(((p * f - 0.5) * f) * f + f + exponent.to(tl.float32) * (0.69314718056 * 2.0**-23))


@triton.jit
def exponentials(seed, position, stream, first, TILE: tl.constexpr):
    """fp32 [TILE]: ``-log(1 - u)``, or its series for small u, whose low bits ``1 - u`` would lose."""
    u = uniforms(seed, position, stream, first, TILE)
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    return tl.where(u < 2.0**-7, series, _minus_log(1.0 - u))

"""Counter-based randomness: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

Every random number of the engine is a pure function of ``(seed, position, stream, token)``. Results therefore do not
depend on batch composition, on the draft length, or on which provider ran, and no number is ever used twice.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_WEYL_A, _WEYL_B = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


class Stream(enum.IntEnum):
    """Second counter word: what a draw at a position is for."""

    SAMPLE = 0  # the token itself: autoregressive and bonus draws, and both sides of coupled verification
    DRAFT = 1  # the draft's own proposal under the rejection rule
    ACCEPT = 2  # the uniform of the acceptance test
    RESIDUAL = 3  # the replacement of a rejected token


def philox_4x32(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """Ten rounds with key = the two halves of ``seed`` and counter = ``(c0, c1, c2, 0)``.

    Args: int64 tensors that broadcast against each other; counters in [0, 2**32), seeds are any 64-bit pattern.
    Returns: int64 ``[..., 4]``, each in [0, 2**32).
    """
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c3 = torch.zeros_like(c0 + c1 + c2 + seed)
    c0, c1, c2 = c0 + c3, c1 + c3, c2 + c3
    for _ in range(10):
        # 32x32 -> 64-bit products do not fit int64's positive range: multiply 16 bits at a time.
        hi0, lo0 = _mul_hi_lo(c0, _ROUND_A)
        hi1, lo1 = _mul_hi_lo(c2, _ROUND_B)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL_A) & _MASK, (k1 + _WEYL_B) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _mul_hi_lo(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    low = (a & 0xFFFF) * constant
    high = (a >> 16) * constant + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def to_uniform(bits: Tensor) -> Tensor:
    """32 random bits to an fp32 uniform in the open interval (0, 1).

    ``(float(bits) + 0.5) * 2**-32``, capped at ``1 - 2**-24``: small values keep 24 significant bits, which is what
    the tail of the exponential race below needs at vocabularies of 10**5 tokens.
    """
    return ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1.0 - 2.0**-24)


def uniform(seed: Tensor, position: Tensor, stream: Stream) -> Tensor:
    """fp32 uniforms in (0, 1), one for each ``(seed, position)``: word 0 of block 0 of ``stream``."""
    block = torch.zeros_like(position)
    return to_uniform(philox_4x32(seed, position, torch.full_like(position, stream), block)[..., 0])


def gumbel(seed: Tensor, position: Tensor, stream: Stream, vocab_size: int) -> Tensor:
    """fp32 ``[N, vocab_size]`` Gumbel(0, 1) noise; token ``t`` uses word ``t % 4`` of block ``t // 4``.

    ``-log(E)`` with ``E = -log(1 - u)``. For ``u < 2**-7`` the series ``u + u^2/2 + u^3/3 + u^4/4`` replaces the
    logarithm, whose argument would have lost the low bits of ``u``; the winner of the race is decided exactly there.
    """
    blocks = torch.arange((vocab_size + 3) // 4, device=seed.device)
    bits = philox_4x32(seed[:, None], position[:, None], torch.full_like(position, stream)[:, None], blocks[None, :])
    u = to_uniform(bits.flatten(1)[:, :vocab_size])
    series = u * (1.0 + u * (0.5 + u * (1.0 / 3.0 + u * 0.25)))
    exponential = torch.where(u < 2.0**-7, series, -torch.log(1.0 - u))
    return -torch.log(exponential)

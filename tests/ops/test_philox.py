"""Randomness: known answers, and the same bits from every implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pearl_kernels.cpu import _core
from pearl_kernels.reference.philox import Stream, gumbel, philox_4x32, to_uniform, uniform


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 from the paper, on Python's integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123, kat_vectors
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert plain_philox(counter, key) == expected
    counters = torch.tensor(counter)
    seed = torch.tensor(signed(key[0] | key[1] << 32))
    ours = philox_4x32(seed, counters[0], counters[1], counters[2])
    assert tuple(ours.tolist()) == plain_philox((*counter[:3], 0), key)  # the engine's last counter word is always 0


def signed(seed: int) -> int:
    return seed - 2**64 if seed >= 2**63 else seed


def test_zero_vector() -> None:
    zero = torch.tensor(0)
    words = philox_4x32(zero, zero, zero, zero).tolist()
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_uniforms_are_in_the_open_interval() -> None:
    u = to_uniform(torch.tensor([0, 1, 2**31, 0xFFFFFF7F, 0xFFFFFFFF]))
    assert u[0] == 2.0**-33
    assert u[-1] == 1 - 2.0**-24
    assert ((u > 0) & (u < 1)).all()


def core_noise(name: str, seed: Tensor, position: Tensor, stream: Stream, vocab_size: int) -> Tensor:
    out = torch.empty(len(seed), vocab_size)
    addresses = seed.data_ptr(), position.data_ptr()
    getattr(_core, name)(*addresses, stream, len(seed), vocab_size, out.data_ptr())
    return out


@pytest.mark.parametrize("vocab_size", [1, 3, 4, 63, 64, 65, 1000])
@pytest.mark.parametrize("stream", list(Stream))
def test_core_uniforms_are_bit_exact(stream: Stream, vocab_size: int) -> None:
    seed = torch.cat((torch.tensor([0, -1, 2**63 - 1, -(2**63)]), torch.randint(-(2**63), 2**63 - 1, (20,))))
    position = torch.cat((torch.tensor([0, 2**32 - 1]), torch.randint(0, 2**32, (22,))))
    blocks = torch.arange((vocab_size + 3) // 4)[None]
    word = torch.full_like(position, stream)[:, None]
    bits = philox_4x32(seed[:, None], position[:, None], word, blocks).flatten(1)[:, :vocab_size]
    ours = core_noise("uniform_noise", seed, position, stream, vocab_size)
    assert torch.equal(ours, to_uniform(bits))
    assert torch.equal(ours[:, 0], uniform(seed, position, stream))


def test_core_gumbel_matches_reference_and_double() -> None:
    seed, position = torch.randint(-(2**63), 2**63 - 1, (50,)), torch.arange(50)
    ours = core_noise("gumbel_noise", seed, position, Stream.SAMPLE, 4099)
    torch.testing.assert_close(ours, gumbel(seed, position, Stream.SAMPLE, 4099), rtol=1e-6, atol=1e-6)
    u = core_noise("uniform_noise", seed, position, Stream.SAMPLE, 4099).double()
    exact = -torch.log(-torch.log1p(-u))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


def test_streams_positions_and_seeds_are_independent() -> None:
    """No draw of one purpose repeats at another seed, position or stream."""
    seed, position = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    noise = torch.cat([core_noise("uniform_noise", seed, position, stream, 64) for stream in Stream])
    correlation = torch.corrcoef(noise) - torch.eye(len(noise))
    assert correlation.abs().max() < 0.5
    assert noise.unique().numel() == noise.numel()

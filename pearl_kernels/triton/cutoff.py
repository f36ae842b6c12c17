"""The cutoff that top-k, top-p and min-p ask for, found without sorting.

Every z is spread over BINS bins, whose counts and masses say in which bins the cutoff can lie; the values in those are
collected, and searched by bisection of their bit patterns. Counts are integers and masses fixed-point integers: sums do
not depend on the order in which programs add, and the cutoff of top-k and top-p is a value of the row, exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pearl_kernels.triton.statistics import BINS, CAPACITY, CUTOFF, LOG_MASS, LOG_MIN_P, TOP_K, TOP_P, TOTAL, load_tile

LIVE = tl.constexpr(-87.0)  # below, exp(z) is no normal fp32: such a token has no mass and cannot be drawn
_BINS_PER_LOGIT = tl.constexpr(16.0)  # as finely as bf16 logits above 8 differ
_BLOCK = tl.constexpr(1024)  # candidates that are searched at a time
_NO_KEY = tl.constexpr(2**31 - 1)
_HALVINGS = tl.constexpr(8)  # of the interval in which `floor_of` looks


@triton.jit
def bin_of(z, inverse_temperature):
    """Grows as z falls. A bin is 1/16 wide in logits, whatever the temperature; the last is open."""
    return tl.minimum(-z * (_BINS_PER_LOGIT / inverse_temperature), BINS - 1.0).to(tl.int32)


@triton.jit
def fixed_mass(z, MASS_BITS: tl.constexpr):
    """exp(z) as an integer, in units of 2**-MASS_BITS."""
    return (tl.exp(z) * 2.0**MASS_BITS).to(tl.int64)


@triton.jit
def floor_of(group, top_k, top_p, log_min_p, total, vocab_size):
    """A z that the cutoff is not below, so that what is smaller need not be counted. group: z of the groups' maxima.

    These are values of the row: where they alone number top_k, or weigh top_p, the cutoff is not below the least of
    them. And values below ``log((1 - top_p) total / vocab_size)`` together weigh less than what top-p leaves out.
    """
    by_count, by_mass = top_k > 0, top_p < 1
    low, high = LIVE, 0.0
    if by_mass & (top_k == 0):
        low = tl.maximum(low, tl.log((1.0 - top_p) * total / vocab_size) - 0.01)
    if by_count | by_mass:
        weight = tl.where(by_count, 1.0, tl.exp(group))
        wanted = tl.where(by_count, top_k.to(tl.float32), top_p * total * 1.00001)
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            enough = tl.sum(tl.where(group >= middle, weight, 0.0)) >= wanted
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    # After top-k, top-p is a share of all that top-k keeps: then a larger min-p must not hide any of it.
    return tl.where(by_count & by_mass, low, tl.maximum(low, log_min_p))


@triton.jit
def bins_of_cutoff(counts, masses, top_k, top_p, log_min_p, total, inverse):
    """First and last bin in which the cutoff lies, ``BINS, -1`` if nothing is cut; whether top-k and top-p have a say.

    total: of the row, in fixed point, as fp64.
    """
    bin = tl.arange(0, BINS)
    count, mass = tl.load(counts + bin), tl.load(masses + bin)
    k_bin = tl.sum((tl.cumsum(count, 0) < top_k).to(tl.int32))
    by_k = (top_k > 0) & (k_bin < BINS)  # else fewer than top_k tokens are alive
    kept = tl.where(by_k, tl.sum(tl.where(bin < k_bin, mass, 0)).to(tl.float64), total)  # at least, by top-k
    p_bin = tl.sum((tl.cumsum(mass, 0).to(tl.float64) < top_p.to(tl.float64) * kept).to(tl.int32))
    by_p = (top_p < 1) & (p_bin < BINS)
    first, last = tl.where(by_p, p_bin, BINS), tl.where(by_p, p_bin, -1)
    if by_k:
        first, last = tl.minimum(first, k_bin), k_bin
    if log_min_p > float("-inf"):
        m_bin = bin_of(log_min_p, inverse)
        if m_bin < first:  # min-p cuts more than the others
            first, last = m_bin, m_bin
            by_k, by_p = m_bin < 0, m_bin < 0
    return first, last, by_k, by_p


@triton.jit
def load_inside(row, begin, vocab_size, peak, inverse, first, last, WIDTH: tl.constexpr):
    """z of WIDTH tokens, and whether it is alive and in bins first to last."""
    z = (load_tile(row, begin, vocab_size, WIDTH) - peak) * inverse
    alive = z >= LIVE
    bin = bin_of(tl.where(alive, z, 0.0), inverse)
    return z, alive & (bin >= first) & (bin <= last)


@triton.jit
def _load_candidates(source, begin):
    """z of _BLOCK candidates, 1 where there is none. source: where they are; in the row, if too many were found."""
    candidates, found, row, vocab_size, peak, inverse, first, last = source
    if found <= CAPACITY:
        index = begin + tl.arange(0, _BLOCK)
        z = tl.load(candidates + index, index < found, 1.0)
    else:
        z, inside = load_inside(row, begin, vocab_size, peak, inverse, first, last, _BLOCK)
        z = tl.where(inside, z, 1.0)
    return z


@triton.jit
def _value_of(key):
    return (key | -(2**31)).to(tl.float32, bitcast=True)


@triton.jit
def _search(source, size, before, wanted, BY_MASS: tl.constexpr, MASS_BITS: tl.constexpr):
    """The largest candidate such that those not below it, and what is before all, weigh at least wanted (fp64).

    The bits of a z <= 0 without the sign are a key that grows as z falls. The interval shrinks to keys of candidates
    with each step, so that few distinct values take few steps.
    """
    low, high = 0, _NO_KEY
    while low < high:
        middle = low + (high - low) // 2
        weight, below, above = before, -1, _NO_KEY
        for begin in range(0, size, _BLOCK):
            z = _load_candidates(source, begin)
            key = tl.where(z <= 0, z.to(tl.int32, bitcast=True) & 0x7FFFFFFF, _NO_KEY)
            up_to = key <= middle
            if BY_MASS:
                weight += tl.sum(tl.where(up_to, fixed_mass(z, MASS_BITS), 0))
            else:
                weight += tl.sum(up_to.to(tl.int64))
            below = tl.maximum(below, tl.max(tl.where(up_to, key, -1)))
            above = tl.minimum(above, tl.min(tl.where(up_to, _NO_KEY, key)))
        reached = weight.to(tl.float64) >= wanted
        low, high = tl.where(reached, low, above), tl.where(reached, below, high)
    return _value_of(low)


@triton.jit
def _mass_of(source, size, before, cutoff, MASS_BITS: tl.constexpr):
    """In fixed point, as fp64: of what is before the candidates, and of those that reach the cutoff."""
    mass = before
    for begin in range(0, size, _BLOCK):
        z = _load_candidates(source, begin)
        mass += tl.sum(tl.where((z <= 0) & (z >= cutoff), fixed_mass(z, MASS_BITS), 0))
    return mass.to(tl.float64)


@triton.jit
def settle_cutoff(record, numbers, source, counts, masses, by_k, by_p, MASS_BITS: tl.constexpr):
    """Find the cutoff among the candidates and the mass that it keeps, and write both.

    record, numbers: of floats and of integers. by_k, by_p: as in `bins_of_cutoff`.
    """
    bin = tl.arange(0, BINS)
    before = bin < source[6]
    mass = tl.sum(tl.load(masses + bin, before, 0))
    size = tl.where(source[1] <= CAPACITY, source[1], source[3])
    cutoff, kept = float("-inf"), tl.load(record + TOTAL).to(tl.float64) * 2.0**MASS_BITS
    if by_k:
        count = tl.sum(tl.load(counts + bin, before, 0)).to(tl.int64)
        cutoff = _search(source, size, count, tl.load(numbers + TOP_K).to(tl.float64), False, MASS_BITS)
        kept = _mass_of(source, size, mass, cutoff, MASS_BITS)
    if by_p:
        wanted = tl.load(record + TOP_P).to(tl.float64) * kept
        cutoff = tl.maximum(cutoff, _search(source, size, mass, wanted, True, MASS_BITS))
    cutoff = tl.maximum(cutoff, tl.load(record + LOG_MIN_P))
    if cutoff > float("-inf"):
        kept = _mass_of(source, size, mass, cutoff, MASS_BITS)
    tl.store(record + CUTOFF, cutoff)
    tl.store(record + LOG_MASS, tl.log((kept * 2.0**-MASS_BITS).to(tl.float32)))

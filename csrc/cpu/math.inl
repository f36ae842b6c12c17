// Elementary functions on vectors, one to two units in the last place (polynomials: Cephes, S. Moshier).

namespace pearl::PEARL_ISA {

/// e^x. Zero below -87.33 (no denormal results), finite above 88.37; NaN stays NaN. A call would pass vectors through
/// memory, which costs as much as the rest.
[[gnu::always_inline]] inline Vec exp(Vec x) {
  const Vec clamped = min(broadcast(88.37f), max(broadcast(-87.33f), x));
  // Adding 1.5 * 2^23 rounds to an integer, which is then found in the low bits of the sum.
  const Vec magic = broadcast(12582912.0f);
  const Vec shifted = mul_add(clamped, broadcast(1.44269504f), magic);
  const Vec n = shifted - magic;
  const Vec r = mul_add(n, broadcast(2.12194440e-4f), mul_add(n, broadcast(-0.693359375f), clamped));
  Vec y = broadcast(1.9875691500e-4f);
  y = mul_add(y, r, broadcast(1.3981999507e-3f));
  y = mul_add(y, r, broadcast(8.3334519073e-3f));
  y = mul_add(y, r, broadcast(4.1665795894e-2f));
  y = mul_add(y, r, broadcast(1.6666665459e-1f));
  y = mul_add(y, r, broadcast(5.0000001201e-1f));
  y = mul_add(y, r * r, r + broadcast(1.0f));
  const Bits power = shift_left(bits_of(shifted) + broadcast_bits(127), 23);
  return select(x < broadcast(-87.33f), broadcast(0.0f), y * float_of(power));
}

/// log(x) of positive normal numbers; anything else gives an arbitrary finite or infinite value.
inline Vec log(Vec x) {
  // x = 2^e * (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2).
  const Bits biased = bits_of(x) + broadcast_bits(0x3F800000 - 0x3F3504F3);
  const Bits mantissa = (biased & broadcast_bits(0x007FFFFF)) + broadcast_bits(0x3F3504F3);
  const Vec e = float_of(shift_right(biased, 23) | broadcast_bits(0x4B000000)) - broadcast(8388608.0f + 127.0f);
  const Vec f = float_of(mantissa) - broadcast(1.0f);
  const Vec square = f * f;
  Vec y = broadcast(7.0376836292e-2f);
  y = mul_add(y, f, broadcast(-1.1514610310e-1f));
  y = mul_add(y, f, broadcast(1.1676998740e-1f));
  y = mul_add(y, f, broadcast(-1.2420140846e-1f));
  y = mul_add(y, f, broadcast(1.4249322787e-1f));
  y = mul_add(y, f, broadcast(-1.6668057665e-1f));
  y = mul_add(y, f, broadcast(2.0000714765e-1f));
  y = mul_add(y, f, broadcast(-2.4999993993e-1f));
  y = mul_add(y, f, broadcast(3.3333331174e-1f));
  y = mul_add(e, broadcast(-2.12194440e-4f), y * f * square);
  y = mul_add(square, broadcast(-0.5f), y);
  return mul_add(e, broadcast(0.693359375f), f + y);
}

/// Good to 1e-7 absolutely, which is what a soft cap of scores needs.
inline Vec tanh(Vec x) {
  const Vec one = broadcast(1.0f), e = exp(min(broadcast(44.0f), x + x));
  return (e - one) / (e + one);
}

}  // namespace pearl::PEARL_ISA

// Counter-based randomness, bit for bit that of pearl_kernels/reference/philox.py up to the uniform numbers.

namespace pearl::PEARL_ISA {

/// What identifies a draw: key of the generator, and first two words of its counter.
struct NoiseKey {
  uint64_t seed;
  uint32_t position, stream;
};

/// Philox4x32-10 of sixteen counters (c[0], c[1], c[2], c[3]), in place.
inline void philox(uint64_t key, Bits (&c)[4]) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    Bits high0, low0, high1, low1;
    multiply_wide(c[0], 0xD2511F53u, high0, low0);
    multiply_wide(c[2], 0xCD9E8D57u, high1, low1);
    c[0] = high1 ^ c[1] ^ broadcast_bits(k0);
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ broadcast_bits(k1);
    c[3] = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

/// In the open interval (0, 1). Each operation rounds once; the file is compiled without contraction.
inline Vec to_uniform(Bits bits) {
  const Vec u = (to_float(bits) + broadcast(0.5f)) * broadcast(0x1p-32f);
  return min(u, broadcast(1.0f - 0x1p-24f));
}

/// Uniforms of the 64 tokens from `first`, a multiple of 64, in order: token t has word t % 4 of block t / 4.
inline void uniform_64(const NoiseKey& key, uint32_t first, Vec (&u)[4]) {
  // Lane 4 i + j computes block 4 j + i, so that transposing words within groups of four lanes gives token order.
  static constexpr uint32_t kBlock[kLanes] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  Bits c[4] = {broadcast_bits(key.position), broadcast_bits(key.stream), load_bits(kBlock) + broadcast_bits(first / 4),
               broadcast_bits(0)};
  philox(key.seed, c);
  transpose_4x4(c);
  for (int i = 0; i < 4; ++i) u[i] = to_uniform(c[i]);
}

/// The one uniform of a draw that needs no more: token 0's.
inline float uniform_one(const NoiseKey& key) {
  Vec u[4];
  float lanes[kLanes];
  uniform_64(key, 0, u);
  store(lanes, u[0]);
  return lanes[0];
}

/// -log(E), E = -log(1 - u) or, for small u, its series: 1 - u would lose the low bits that decide the race.
inline Vec to_gumbel(Vec u) {
  const Vec one = broadcast(1.0f), zero = broadcast(0.0f);
  Vec series = mul_add(u, broadcast(0.25f), broadcast(1.0f / 3.0f));
  series = u * mul_add(u, mul_add(u, series, broadcast(0.5f)), one);
  return zero - log(select(u < broadcast(0x1p-7f), series, zero - log(one - u)));
}

/// No noise exceeds -log(2^-33) = 22.874.
inline constexpr float kLargestNoise = 22.88f;

template <class Transform>
void fill_noise(const NoiseParams& p, Transform transform) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const NoiseKey key = {static_cast<uint64_t>(p.seed[row]), static_cast<uint32_t>(p.position[row]), p.stream};
    for (int64_t first = 0; first < p.vocab_size; first += 4 * kLanes) {
      Vec u[4];
      uniform_64(key, static_cast<uint32_t>(first), u);
      for (int64_t i = 0; i < 4 && first + i * kLanes < p.vocab_size; ++i) {
        const int64_t at = first + i * kLanes, left = p.vocab_size - at;
        store_some(p.out + row * p.vocab_size + at, transform(u[i]), left < kLanes ? left : kLanes);
      }
    }
  }
}

void uniform_noise(const NoiseParams& p) {
  fill_noise(p, [](Vec u) { return u; });
}

void gumbel_noise(const NoiseParams& p) {
  fill_noise(p, [](Vec u) { return to_gumbel(u); });
}

}  // namespace pearl::PEARL_ISA

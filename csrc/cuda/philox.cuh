// Counter-based randomness, bit for bit that of pearl_kernels/reference/philox.py up to the uniform numbers, and the
// Gumbel race: the argmax of log weight + noise over the vocabulary is a draw from the weights.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/block.cuh"

namespace pearl::cuda {

// Streams of the reference: the second word of the counter.
inline constexpr uint32_t kSampleStream = 0, kAcceptStream = 2, kResidualStream = 3;

/// What identifies a draw: key of the generator, and first two words of its counter.
struct NoiseKey {
  uint64_t seed;
  uint32_t position, stream;
};

/// The four words of a block: Philox4x32-10 of the counter (position, stream, block, 0).
__device__ __forceinline__ uint4 philox(const NoiseKey& key, uint32_t block) {
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  uint4 c = make_uint4(key.position, key.stream, block, 0);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c.x, product1 = uint64_t{0xCD9E8D57u} * c.z;
    c = make_uint4(static_cast<uint32_t>(product1 >> 32) ^ c.y ^ k0, static_cast<uint32_t>(product1),
                   static_cast<uint32_t>(product0 >> 32) ^ c.w ^ k1, static_cast<uint32_t>(product0));
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

/// In the open interval (0, 1). Each operation rounds once: no contraction.
__device__ __forceinline__ float to_uniform(uint32_t bits) {
  const float u = __fmul_rn(__fadd_rn(__uint2float_rn(bits), 0.5f), 0x1p-32f);
  return fminf(u, 1.0f - 0x1p-24f);
}

/// The one uniform of a draw that needs no more: token 0's.
__device__ __forceinline__ float uniform_one(const NoiseKey& key) { return to_uniform(philox(key, 0).x); }

/// -log(E), E = -log(1 - u) or, for small u, its series: 1 - u would lose the low bits that decide the race.
__device__ __forceinline__ float to_gumbel(float u) {
  const float series = u * fmaf(u, fmaf(u, fmaf(u, 0.25f, 1.0f / 3.0f), 0.5f), 1.0f);
  return -logf(u < 0x1p-7f ? series : -logf(1.0f - u));
}

/// Bounds of the noise: -log(2^-33) = 22.874, and -log(-log(2^-24)) = -2.812.
inline constexpr float kLargestNoise = 22.88f, kSmallestNoise = -2.82f;

/// One thread's part of a race. The warp shares `best`, so that few tokens cost logarithms.
struct Race {
  float best;   // no token with a lower score can win
  float score;  // of `token`
  int32_t token = -1;

  __device__ explicit Race(float lower_bound) : best(lower_bound), score(-__builtin_huge_valf()) {}

  /// Tokens first to first + 3; first is a multiple of four. bound[j], which may be NaN, is at least log_weight(j),
  /// which is asked for only if token j may win. All lanes of the warp call this together.
  template <class LogWeight>
  __device__ __forceinline__ void enter(const NoiseKey& key, int first, const float (&bound)[4],
                                        const LogWeight& log_weight) {
    const float top = fmaxf(fmaxf(bound[0], bound[1]), fmaxf(bound[2], bound[3]));
    if (top + kLargestNoise > best) {
      const uint4 bits = philox(key, static_cast<uint32_t>(first) / 4);
      const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float u = to_uniform(words[j]);
        // The noise is at most -log(u); the fast logarithm is good to 1e-5 here.
        if (!(fmaf(-0.69314718f, __log2f(u), bound[j]) + 1e-3f > best)) continue;
        const float reached = log_weight(j) + to_gumbel(u);
        if (!(reached > score)) continue;
        score = reached;
        token = first + j;
        best = fmaxf(best, reached);
      }
    }
    best = warp_reduce(best, Larger());
  }

  __device__ Wide packed() const { return pack_token(score, token); }
};

}  // namespace pearl::cuda

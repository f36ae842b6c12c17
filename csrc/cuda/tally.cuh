// Weights added up in bins, exactly: sums of integers do not depend on their order. Bins are ranges of the scaled
// logits z <= 0, whose bits without the sign are a key that grows as z falls.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/block.cuh"

namespace pearl::cuda {

inline constexpr int kBinBits = 11, kBins = 1 << kBinBits;
inline constexpr uint32_t kLastKey = 0x7F800000;  // of -inf; NaNs have larger ones and never count

__device__ __forceinline__ uint32_t key_of(float z) { return __float_as_uint(z) & 0x7FFFFFFFu; }
__device__ __forceinline__ float value_of_key(uint32_t key) { return __uint_as_float(key | 0x80000000u); }

// The first spreading: bins are 1/128 to 1/256 of |z| wide between 2^-4 and 2^12, which is finer than bf16 logits
// usually are. The first and the last bin take what is beyond.
inline constexpr int kCoarseShift = 16, kFirstCoarse = (127 - 4) << 7;

__device__ __forceinline__ int coarse_bin(uint32_t key) {
  const int bin = static_cast<int>(key >> kCoarseShift) - kFirstCoarse;
  return bin < 0 ? 0 : bin < kBins ? bin : kBins - 1;
}

/// Keys low to high, both included.
struct KeyBounds {
  uint32_t low, high;
};

__device__ __forceinline__ KeyBounds keys_of_coarse_bins(int first, int last) {
  return {first == 0 ? 0 : static_cast<uint32_t>(first + kFirstCoarse) << kCoarseShift,
          last == kBins - 1 ? kLastKey : (static_cast<uint32_t>(last + 1 + kFirstCoarse) << kCoarseShift) - 1};
}

/// Probability mass in fixed point: units of 2^-40, so that 2^23 tokens fit and the error of 2^17 is below 2e-7.
inline constexpr double kMassUnit = 0x1p-40;

__device__ __forceinline__ Wide mass_of(float z) { return static_cast<Wide>(expf(z) * 0x1p40f); }

/// 64-bit sums in shared memory. Two 32-bit halves, because shared memory adds 64 bits only by trying again and again.
struct Tally {
  uint32_t low[kBins], high[kBins];

  __device__ void add(int bin, Wide weight) {
    const uint32_t low_part = static_cast<uint32_t>(weight);
    const uint32_t before = atomicAdd(&low[bin], low_part);
    const uint32_t carried = static_cast<uint32_t>(weight >> 32) + (before + low_part < low_part ? 1 : 0);
    if (carried != 0) atomicAdd(&high[bin], carried);
  }
  __device__ Wide at(int bin) const { return Wide{high[bin]} << 32 | low[bin]; }
  __device__ void set(int bin, Wide weight) {
    low[bin] = static_cast<uint32_t>(weight);
    high[bin] = static_cast<uint32_t>(weight >> 32);
  }
};

struct Found {
  int32_t bin;  // kBins: the weights do not reach
  Wide before;  // weight of the bins before it
};

/// Shared memory of `locate` and `sum_of_bins`.
struct LocateScratch {
  Wide warps[kWarpLanes];
  Found found;
};

/// The first bin at which the sum of weight_of(bin) reaches `wanted` > 0. All threads call it and get the result. A
/// barrier lies between two calls.
template <int kThreads, class WeightOf>
__device__ __forceinline__ Found locate(Wide wanted, LocateScratch& scratch, const WeightOf& weight_of) {
  constexpr int kOwn = kBins / kThreads;
  const int first = threadIdx.x * kOwn, lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  Wide own = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) own += weight_of(first + i);
  Wide before = own;  // becomes the weight of all bins before this thread's
#pragma unroll
  for (int distance = 1; distance < kWarpLanes; distance *= 2) {
    const Wide other = __shfl_up_sync(kAllLanes, before, distance);
    if (lane >= distance) before += other;
  }
  if (lane == kWarpLanes - 1) scratch.warps[warp] = before;
  if (threadIdx.x == 0) scratch.found = {kBins, 0};
  __syncthreads();  // the sums of all warps are there; `found` is empty before the thread that has the bin fills it
  before -= own;
  for (int i = 0; i < warp; ++i) before += scratch.warps[i];
  if (before < wanted && wanted <= before + own) {
    int bin = first;
    for (Wide weight; before + (weight = weight_of(bin)) < wanted; ++bin) before += weight;
    scratch.found = {bin, before};
  }
  __syncthreads();  // `found` is filled before it is read
  return scratch.found;
}

/// Weight of the bins below `end`.
template <int kThreads, class WeightOf>
__device__ __forceinline__ Wide sum_of_bins(int end, LocateScratch& scratch, const WeightOf& weight_of) {
  Wide sum = 0;
  for (int bin = threadIdx.x; bin < end; bin += kThreads) sum += weight_of(bin);
  return block_reduce<kThreads>(sum, scratch.warps, Sum());
}

}  // namespace pearl::cuda

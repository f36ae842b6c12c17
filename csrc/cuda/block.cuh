// What the threads of a warp or a block do together: reductions, ordered pairs, and finding out who is last.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/reduce.cuh"

namespace pearl::cuda {

inline constexpr unsigned kAllLanes = 0xFFFFFFFFu;

/// A 64-bit integer that the device's functions take.
using Wide = unsigned long long;

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }  // of a number and NaN, the number
  __device__ Wide operator()(Wide a, Wide b) const { return a > b ? a : b; }
};

struct Smaller {
  __device__ float operator()(float a, float b) const { return fminf(a, b); }
  __device__ int operator()(int a, int b) const { return a < b ? a : b; }
};

struct Sum {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

/// Every lane gets the result. The order of combining is fixed.
template <class T, class Combine>
__device__ __forceinline__ T warp_reduce(T value, const Combine& combine) {
#pragma unroll
  for (int distance = kWarpLanes / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

/// Every thread gets the result. `scratch` is shared memory for kThreads / 32 values; it is free again on return.
template <int kThreads, class T, class Combine>
__device__ __forceinline__ T block_reduce(T value, T* scratch, const Combine& combine) {
  value = warp_reduce(value, combine);
  if (threadIdx.x % kWarpLanes == 0) scratch[threadIdx.x / kWarpLanes] = value;
  __syncthreads();  // the warps' values are written before they are read
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarpLanes; ++warp) value = combine(value, scratch[warp]);
  __syncthreads();  // they are read before the next call writes over them
  return value;
}

/// Unsigned integers in the order of the floats, NaN aside; -0 is below +0.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float float_of_ordered(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits);
}

/// A token with its score. The larger score wins, then the smaller token; zero is none.
__device__ __forceinline__ Wide pack_token(float score, int32_t token) {
  if (token < 0) return 0;
  return Wide{ordered_bits(score + 0.0f)} << 32 | static_cast<uint32_t>(~token);  // + 0: both zeros are equal
}

__device__ __forceinline__ int32_t token_of(Wide packed) {
  return packed == 0 ? -1 : static_cast<int32_t>(~static_cast<uint32_t>(packed));
}

/// Whether the calling block is the last of `expected` that get here. What the others wrote before is then visible to
/// all its threads through __ldcg. The last one sets the counter back to zero. All threads call it; `flag` is shared
/// memory. One thread fences for its block: a fence passes on what a barrier has brought to it.
__device__ __forceinline__ bool last_to_arrive(uint32_t* counter, uint32_t expected, bool* flag) {
  __syncthreads();  // all of the block's writes come before the fence; and reads of a flag before it is written again
  if (threadIdx.x == 0) {
    __threadfence();  // what this block wrote is seen by who sees it counted
    *flag = atomicAdd(counter, 1u) + 1 == expected;
    if (*flag) atomicExch(counter, 0u);  // a plain store would race with the others' counting
    __threadfence();                     // what the counted blocks wrote is seen from here on
  }
  __syncthreads();  // the flag is written, and what its writer sees is seen by all, before anyone reads it
  return *flag;
}

}  // namespace pearl::cuda

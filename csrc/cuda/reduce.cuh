// Sums over the lanes of a warp and the threads of a block. Every thread gets the same bits, whatever else runs.
#pragma once

#include <cuda_runtime.h>

namespace pearl::cuda {

inline constexpr int kWarpLanes = 32;

/// The sum over each group of kGroup neighbouring lanes. All lanes of the warp take part.
template <int kGroup = kWarpLanes>
__device__ __forceinline__ float group_sum(float x) {
#pragma unroll
  for (int distance = kGroup / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
  return x;
}

/// The sum over a block of whole warps. At most one call in flight: a barrier lies between two calls.
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float sums[kWarpLanes];
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes, warps = blockDim.x / kWarpLanes;
  x = group_sum(x);
  if (warps == 1) return x;
  if (lane == 0) sums[warp] = x;
  __syncthreads();  // the warps' sums are written before they are read
  return group_sum(lane < warps ? sums[lane] : 0.0f);
}

}  // namespace pearl::cuda

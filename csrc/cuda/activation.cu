// silu_and_mul: each thread makes 16 bytes of the result from 32 bytes of the input.
#include "cuda/convert.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace pearl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

/// A block makes a stretch of the row blockIdx.x.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) silu_and_mul_kernel(SiluAndMulParams p) {
  constexpr int kCount = kPackElements<T>;
  const T* gates = static_cast<const T*>(p.x) + blockIdx.x * p.x_stride;
  const T* ups = gates + p.width;
  T* out = static_cast<T*>(p.out) + blockIdx.x * p.width;
  const int64_t step = int64_t{kCount} * kThreads * gridDim.y;
  for (int64_t at = kCount * (int64_t{blockIdx.y} * kThreads + threadIdx.x); at < p.width; at += step) {
    if (kAligned || at + kCount <= p.width) {
      const Pack<T, kCount> gate = load_pack<kCount, kAligned>(gates + at);
      const Pack<T, kCount> up = load_pack<kCount, kAligned>(ups + at);
      Pack<T, kCount> result;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        result.values[i] = from_float<T>(silu(to_float(gate.values[i])) * to_float(up.values[i]));
      }
      store_pack<kAligned>(out + at, result);
    } else {
      for (int64_t i = at; i < p.width; ++i) out[i] = from_float<T>(silu(to_float(gates[i])) * to_float(ups[i]));
    }
  }
}

template <class T>
cudaError_t launch(const SiluAndMulParams& p, cudaStream_t stream) {
  constexpr int64_t kCount = kPackElements<T>, kStretch = kCount * kThreads;
  const bool vectors = aligned(16, p.x, p.out) && p.width % kCount == 0 && p.x_stride % kCount == 0;
  const int64_t stretches = (p.width + kStretch - 1) / kStretch;
  const dim3 grid(static_cast<unsigned>(p.rows), static_cast<unsigned>(stretches < kMaxGridY ? stretches : kMaxGridY));
  const auto kernel = vectors ? silu_and_mul_kernel<T, true> : silu_and_mul_kernel<T, false>;
  return PEARL_LAUNCH(kernel, grid, kThreads, 0, stream, p);
}

}  // namespace

cudaError_t silu_and_mul(const SiluAndMulParams& p, cudaStream_t stream) {
  if (p.rows < 0 || p.rows > INT32_MAX || p.width < 0) return cudaErrorInvalidValue;
  if (p.rows == 0 || p.width == 0) return cudaSuccess;
  return for_dtype(p.dtype, [&](auto zero) { return launch<decltype(zero)>(p, stream); });
}

}  // namespace pearl::cuda

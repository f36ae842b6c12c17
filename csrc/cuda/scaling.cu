// scale_and_cap: each thread reads and writes 16 bytes.
#include "cuda/convert.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace pearl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

/// -inf, a banned token, stays.
template <bool kCapped>
__device__ __forceinline__ float scaled(float x, const ScaleAndCapParams& p) {
  const float value = x * p.scale;
  if constexpr (!kCapped) return value;
  return value == -INFINITY ? value : p.softcap * tanhf(value / p.softcap);
}

/// A block makes a stretch of the row blockIdx.x.
template <class T, bool kCapped, bool kAligned>
__global__ void __launch_bounds__(kThreads) scale_and_cap_kernel(ScaleAndCapParams p) {
  constexpr int kCount = kPackElements<T>;
  T* x = static_cast<T*>(p.x) + blockIdx.x * p.x_stride;
  const int64_t step = int64_t{kCount} * kThreads * gridDim.y;
  for (int64_t at = kCount * (int64_t{blockIdx.y} * kThreads + threadIdx.x); at < p.width; at += step) {
    if (kAligned || at + kCount <= p.width) {
      Pack<T, kCount> pack = load_pack<kCount, kAligned>(x + at);
#pragma unroll
      for (int i = 0; i < kCount; ++i) pack.values[i] = from_float<T>(scaled<kCapped>(to_float(pack.values[i]), p));
      store_pack<kAligned>(x + at, pack);
    } else {
      for (int64_t i = at; i < p.width; ++i) x[i] = from_float<T>(scaled<kCapped>(to_float(x[i]), p));
    }
  }
}

template <class T, bool kCapped>
cudaError_t launch(const ScaleAndCapParams& p, cudaStream_t stream) {
  constexpr int64_t kCount = kPackElements<T>, kStretch = kCount * kThreads;
  const bool vectors = aligned(16, p.x) && p.width % kCount == 0 && p.x_stride % kCount == 0;
  const int64_t stretches = (p.width + kStretch - 1) / kStretch;
  const dim3 grid(static_cast<unsigned>(p.rows), static_cast<unsigned>(stretches < kMaxGridY ? stretches : kMaxGridY));
  const auto kernel = vectors ? scale_and_cap_kernel<T, kCapped, true> : scale_and_cap_kernel<T, kCapped, false>;
  return PEARL_LAUNCH(kernel, grid, kThreads, 0, stream, p);
}

}  // namespace

cudaError_t scale_and_cap(const ScaleAndCapParams& p, cudaStream_t stream) {
  if (p.rows < 0 || p.rows > INT32_MAX || p.width < 0) return cudaErrorInvalidValue;
  if (p.rows == 0 || p.width == 0) return cudaSuccess;
  return for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return p.softcap > 0 ? launch<T, true>(p, stream) : launch<T, false>(p, stream);
  });
}

}  // namespace pearl::cuda

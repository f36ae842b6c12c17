// silu_and_mul and gelu_and_mul: each thread makes 16 bytes of the result from 32 bytes of the input.
#include "cuda/convert.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace pearl::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridY = 65535;

/// Both activations are x / (1 + e^-t). A denominator past 2^126 would make __fdividef zero, as it should be.
template <Activation kActivation>
__device__ __forceinline__ float activated(float x) {
  if constexpr (kActivation == Activation::kSilu) return __fdividef(x, 1.0f + __expf(-x));
  // 0.5 x (1 + tanh(u)), t = 2 u, u = sqrt(2 / pi) (x + 0.044715 x^3).
  return __fdividef(x, 1.0f + __expf(-1.5957691216f * x * (1.0f + 0.044715f * x * x)));
}

/// A block makes a stretch of the row blockIdx.x.
template <class T, Activation kActivation, bool kAligned>
__global__ void __launch_bounds__(kThreads) activation_kernel(GatedParams p) {
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
        result.values[i] = from_float<T>(activated<kActivation>(to_float(gate.values[i])) * to_float(up.values[i]));
      }
      store_pack<kAligned>(out + at, result);
    } else {
      for (int64_t i = at; i < p.width; ++i) {
        out[i] = from_float<T>(activated<kActivation>(to_float(gates[i])) * to_float(ups[i]));
      }
    }
  }
}

template <class T, Activation kActivation>
cudaError_t launch(const GatedParams& p, cudaStream_t stream) {
  constexpr int64_t kCount = kPackElements<T>, kStretch = kCount * kThreads;
  const bool vectors = aligned(16, p.x, p.out) && p.width % kCount == 0 && p.x_stride % kCount == 0;
  const int64_t stretches = (p.width + kStretch - 1) / kStretch;
  const dim3 grid(static_cast<unsigned>(p.rows), static_cast<unsigned>(stretches < kMaxGridY ? stretches : kMaxGridY));
  const auto kernel = vectors ? activation_kernel<T, kActivation, true> : activation_kernel<T, kActivation, false>;
  return PEARL_LAUNCH(kernel, grid, kThreads, 0, stream, p);
}

}  // namespace

cudaError_t gated_activation(const GatedParams& p, cudaStream_t stream) {
  if (p.rows < 0 || p.rows > INT32_MAX || p.width < 0) return cudaErrorInvalidValue;
  if (p.rows == 0 || p.width == 0) return cudaSuccess;
  return for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return p.activation == Activation::kSilu ? launch<T, Activation::kSilu>(p, stream)
                                             : launch<T, Activation::kGeluTanh>(p, stream);
  });
}

}  // namespace pearl::cuda

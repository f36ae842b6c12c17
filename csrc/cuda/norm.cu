// rms_norm and add_rms_norm: a block for each row, which it reads once and keeps in registers.
#include <algorithm>

#include "cuda/convert.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace pearl::cuda {
namespace {

constexpr int kPacks = 4;         // of 16 bytes a thread: 64 bytes in flight for each tensor read
constexpr int kMaxThreads = 512;  // 128 registers a thread: nothing is spilled

template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> sum(const Pack<T, kCount>& a, const Pack<T, kCount>& b) {
  Pack<T, kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) result.values[i] = from_float<T>(to_float(a.values[i]) + to_float(b.values[i]));
  return result;
}

template <class T, int kCount>
__device__ __forceinline__ float sum_of_squares(const Pack<T, kCount>& pack) {
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float value = to_float(pack.values[i]);
    total += value * value;
  }
  return total;
}

template <class T, int kCount>
__device__ __forceinline__ void give(const Pack<T, kCount>& pack, float scale, const Pack<T, kCount>& factors, T* out) {
  Pack<T, kCount> result;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    result.values[i] = from_float<T>(to_float(pack.values[i]) * scale * to_float(factors.values[i]));
  }
  store_pack<true>(out, result);
}

template <class T>
struct Row {
  __device__ explicit Row(const RmsNormParams& p)
      : x(static_cast<const T*>(p.x) + blockIdx.x * p.x_stride),
        residual(static_cast<T*>(p.residual) + blockIdx.x * p.residual_stride),
        weight(static_cast<const T*>(p.weight)),
        out(static_cast<T*>(p.out) + blockIdx.x * p.width) {}
  const T* x;
  T* residual;
  const T* weight;
  T* out;
};

__device__ __forceinline__ float norm_scale(float squares, const RmsNormParams& p) {
  return rsqrtf(__fdividef(block_sum(squares), static_cast<float>(p.width)) + p.eps);
}

/// For rows of at most kPacks packs a thread, all addresses multiples of 16. Everything is read before anything is
/// used: a row costs one latency of the memory.
template <class T, bool kAdd>
__global__ void __launch_bounds__(kMaxThreads) norm_in_registers(RmsNormParams p) {
  constexpr int kCount = kPackElements<T>;
  const Row<T> row(p);
  const int width = static_cast<int>(p.width), step = kCount * static_cast<int>(blockDim.x);
  const int first = kCount * static_cast<int>(threadIdx.x);
  Pack<T, kCount> packs[kPacks], residuals[kPacks], factors[kPacks];
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = first + i * step;
    if (at < width) packs[i] = load_pack<kCount, true>(row.x + at);
    if (kAdd && at < width) residuals[i] = load_pack<kCount, true>(row.residual + at);
    if (at < width) factors[i] = load_pack<kCount, true>(row.weight + at);
  }
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = first + i * step;
    if (at >= width) continue;
    if (kAdd) {
      packs[i] = sum(residuals[i], packs[i]);
      store_pack<true>(row.residual + at, packs[i]);
    }
    squares += sum_of_squares(packs[i]);
  }
  const float scale = norm_scale(squares, p);
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    const int at = first + i * step;
    if (at < width) give(packs[i], scale, factors[i], row.out + at);
  }
}

/// For any row: element by element, read twice, the second time from the cache.
template <class T, bool kAdd>
__global__ void __launch_bounds__(kMaxThreads) norm_by_elements(RmsNormParams p) {
  const Row<T> row(p);
  float squares = 0.0f;
  for (int64_t at = threadIdx.x; at < p.width; at += blockDim.x) {
    Pack<T, 1> element = load_pack<1, true>(row.x + at);
    if (kAdd) {
      element = sum(load_pack<1, true>(row.residual + at), element);
      store_pack<true>(row.residual + at, element);
    }
    squares += sum_of_squares(element);
  }
  const float scale = norm_scale(squares, p);
  const T* normed = kAdd ? row.residual : row.x;
  for (int64_t at = threadIdx.x; at < p.width; at += blockDim.x) {
    give(load_pack<1, true>(normed + at), scale, load_pack<1, true>(row.weight + at), row.out + at);
  }
}

int whole_warps(int64_t threads) {
  const int64_t warps = std::max<int64_t>(1, (threads + kWarpLanes - 1) / kWarpLanes);
  return static_cast<int>(std::min<int64_t>(warps * kWarpLanes, kMaxThreads));
}

template <class T, bool kAdd>
cudaError_t launch(const RmsNormParams& p, cudaStream_t stream) {
  constexpr int64_t kCount = kPackElements<T>;
  const bool vectors = aligned(16, p.x, p.residual, p.weight, p.out) && p.width % kCount == 0 &&
                       p.x_stride % kCount == 0 && p.residual_stride % kCount == 0;
  const unsigned rows = static_cast<unsigned>(p.rows);
  if (vectors && p.width <= kCount * kPacks * kMaxThreads) {
    const auto kernel = norm_in_registers<T, kAdd>;
    return PEARL_LAUNCH(kernel, rows, whole_warps((p.width / kCount + kPacks - 1) / kPacks), 0, stream, p);
  }
  const auto kernel = norm_by_elements<T, kAdd>;
  return PEARL_LAUNCH(kernel, rows, whole_warps(p.width), 0, stream, p);
}

}  // namespace

cudaError_t rms_norm(const RmsNormParams& p, cudaStream_t stream) {
  if (p.rows < 0 || p.rows > INT32_MAX || p.width < 0) return cudaErrorInvalidValue;
  if (p.rows == 0 || p.width == 0) return cudaSuccess;
  return for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    return p.residual == nullptr ? launch<T, false>(p, stream) : launch<T, true>(p, stream);
  });
}

}  // namespace pearl::cuda

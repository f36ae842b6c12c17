// rope_and_cache: a group of neighbouring lanes for each head of q, k and v of a token. A lane has four elements of the
// head's first half and the four of its second half that they are rotated with.
#include "cuda/convert.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace pearl::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kElements = 4;  // of each half: head_dim is a multiple of 8
constexpr int64_t kMaxHeadDim = 2 * kElements * kWarpLanes;

/// Where a head is read and written, and what happens to it; out is null where nothing is written.
template <class T>
struct Head {
  const T* in;
  T* out;
  const T* norm;  // null: none
  bool rotated;
  int64_t position;
};

/// Head `index` of a token: the query heads come first, then k's, then v's.
template <class T>
__device__ __forceinline__ Head<T> find_head(const RopeAndCacheParams& p, int64_t token, int index) {
  const int query_heads = static_cast<int>(p.query_heads), kv_heads = static_cast<int>(p.kv_heads);
  const int64_t position = p.positions[token];
  const bool known = position >= 0 && position < p.max_position;
  if (index < query_heads) {
    T* q = static_cast<T*>(p.q) + token * p.q_stride + index * p.head_dim;
    return {q, known ? q : nullptr, static_cast<const T*>(p.q_norm), true, position};
  }
  const int64_t slot = p.slot_mapping[token];
  const bool live = known && slot >= 0 && slot < p.slots;
  const bool is_k = index < query_heads + kv_heads;
  const int head = index - query_heads - (is_k ? 0 : kv_heads);
  const T* in =
      is_k ? static_cast<const T*>(p.k) + token * p.k_stride : static_cast<const T*>(p.v) + token * p.v_stride;
  T* cache = static_cast<T*>(is_k ? p.k_cache : p.v_cache);
  T* out = live ? cache + (slot * p.kv_heads + head) * p.head_dim : nullptr;
  return {in + head * p.head_dim, out, is_k ? static_cast<const T*>(p.k_norm) : nullptr, is_k, position};
}

/// x * scale * weight, rounded to T as the operator by itself would.
template <class T, bool kAligned>
__device__ __forceinline__ void scale_pack(Pack<T, kElements>& pack, float scale, const T* weight) {
  const Pack<T, kElements> factors = load_pack<kElements, kAligned>(weight);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    pack.values[i] = from_float<T>(to_float(pack.values[i]) * scale * to_float(factors.values[i]));
  }
}

template <class T, bool kAligned>
__device__ __forceinline__ void rotate(Pack<T, kElements>& first, Pack<T, kElements>& second, const float* cos,
                                       const float* sin) {
  const Pack<float, kElements> c = load_pack<kElements, kAligned>(cos), s = load_pack<kElements, kAligned>(sin);
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const float a = to_float(first.values[i]), b = to_float(second.values[i]);
    first.values[i] = from_float<T>(a * c.values[i] - b * s.values[i]);
    second.values[i] = from_float<T>(b * c.values[i] + a * s.values[i]);
  }
}

template <class T>
__device__ __forceinline__ float square_sum(const Pack<T, kElements>& first, const Pack<T, kElements>& second) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const float a = to_float(first.values[i]), b = to_float(second.values[i]);
    sum += a * a + b * b;
  }
  return sum;
}

/// kGroup lanes a head, the smallest power of two that covers it.
template <class T, int kGroup, bool kAligned>
__global__ void __launch_bounds__(kThreads) rope_and_cache_kernel(RopeAndCacheParams p) {
  const int heads = static_cast<int>(p.query_heads + 2 * p.kv_heads), half = static_cast<int>(p.head_dim / 2);
  const int item = static_cast<int>(blockIdx.x) * (kThreads / kGroup) + static_cast<int>(threadIdx.x) / kGroup;
  const int token = item / heads;
  const int at = kElements * static_cast<int>(threadIdx.x % kGroup);
  Head<T> head = {};
  if (token < p.tokens) head = find_head<T>(p, token, item - token * heads);
  const bool works = head.out != nullptr && at < half;
  Pack<T, kElements> first, second;
  if (works) {
    first = load_pack<kElements, kAligned>(head.in + at);
    second = load_pack<kElements, kAligned>(head.in + half + at);
  }
  if (p.q_norm != nullptr || p.k_norm != nullptr) {  // the same for all lanes: they sum together
    const float squares = group_sum<kGroup>(works ? square_sum(first, second) : 0.0f);
    if (works && head.norm != nullptr) {
      const float scale = rsqrtf(squares / static_cast<float>(p.head_dim) + p.eps);
      scale_pack<T, kAligned>(first, scale, head.norm + at);
      scale_pack<T, kAligned>(second, scale, head.norm + half + at);
    }
  }
  if (!works) return;
  if (head.rotated) {
    const float* cos = p.cos_sin + head.position * p.head_dim + at;
    rotate<T, kAligned>(first, second, cos, cos + half);
  }
  store_pack<kAligned>(head.out + at, first);
  store_pack<kAligned>(head.out + half + at, second);
}

template <class T, int kGroup>
cudaError_t launch(const RopeAndCacheParams& p, cudaStream_t stream) {
  const int64_t items = p.tokens * (p.query_heads + 2 * p.kv_heads), items_of_block = kThreads / kGroup;
  if (items > INT32_MAX - kThreads) return cudaErrorInvalidValue;  // numbered in 32 bits
  const int64_t blocks = (items + items_of_block - 1) / items_of_block;
  const bool vectors = aligned(kElements * sizeof(T), p.q, p.k, p.v, p.k_cache, p.v_cache, p.q_norm, p.k_norm) &&
                       aligned(kElements * sizeof(float), p.cos_sin) &&
                       (p.q_stride | p.k_stride | p.v_stride) % kElements == 0;
  const auto kernel = vectors ? rope_and_cache_kernel<T, kGroup, true> : rope_and_cache_kernel<T, kGroup, false>;
  return PEARL_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, p);
}

}  // namespace

cudaError_t rope_and_cache(const RopeAndCacheParams& p, cudaStream_t stream) {
  if (p.head_dim % (2 * kElements) != 0 || p.head_dim < 8 || p.head_dim > kMaxHeadDim) return cudaErrorInvalidValue;
  if (p.tokens < 0 || p.query_heads < 0 || p.kv_heads < 0) return cudaErrorInvalidValue;
  if (p.tokens * (p.query_heads + p.kv_heads) == 0) return cudaSuccess;
  return for_dtype(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int64_t lanes = p.head_dim / (2 * kElements);
    return lanes <= 8 ? launch<T, 8>(p, stream) : lanes <= 16 ? launch<T, 16>(p, stream) : launch<T, 32>(p, stream);
  });
}

}  // namespace pearl::cuda

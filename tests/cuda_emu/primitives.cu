// One small kernel for each thing that the shim emulates; tests/emulated/test_cuda_shim.py checks them against
// formulas. A GPU runs the same file: nvcc compiles it.
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace {

using pearl::cuda::cp_async_16;
using pearl::cuda::cp_async_16_or_zero;
using pearl::cuda::cp_async_commit;
using pearl::cuda::cp_async_wait;

constexpr unsigned kAll = 0xFFFFFFFFu;

// out[4][threads]: the lane's value from each kind of shuffle, within groups of `width`.
__global__ void shuffles(const float* in, float* out, int argument, int width) {
  const int t = threadIdx.x, n = blockDim.x;
  out[t] = __shfl_sync(kAll, in[t], argument, width);
  out[n + t] = __shfl_up_sync(kAll, in[t], argument, width);
  out[2 * n + t] = __shfl_down_sync(kAll, in[t], argument, width);
  out[3 * n + t] = __shfl_xor_sync(kAll, in[t], argument, width);
}

// out[9][threads]: votes and reductions over the lanes of a mask; the other lanes do something else meanwhile.
__global__ void votes(const int32_t* in, uint32_t* out, uint32_t mask) {
  const int t = threadIdx.x, n = blockDim.x;
  if (!(mask >> (t % 32) & 1)) {
    out[t] = __ballot_sync(~mask, 1);
    return;
  }
  out[t] = __ballot_sync(mask, in[t] > 0);
  out[n + t] = __any_sync(mask, in[t] > 0);
  out[2 * n + t] = __all_sync(mask, in[t] > 0);
  out[3 * n + t] = __reduce_add_sync(mask, in[t]);
  out[4 * n + t] = __reduce_max_sync(mask, in[t]);
  out[5 * n + t] = __reduce_min_sync(mask, in[t]);
  out[6 * n + t] = __reduce_or_sync(mask, static_cast<uint32_t>(in[t]));
  out[7 * n + t] = __reduce_and_sync(mask, static_cast<uint32_t>(in[t]));
  out[8 * n + t] = __match_any_sync(mask, in[t]);
}

// out[3]: the block's answers.
__global__ void block_votes(const int32_t* in, int32_t* out) {
  const int t = threadIdx.x;
  const int any = __syncthreads_or(in[t]), all = __syncthreads_and(in[t]), count = __syncthreads_count(in[t]);
  if (t == static_cast<int>(blockDim.x) - 1) {
    out[0] = any != 0;
    out[1] = all != 0;
    out[2] = count;
  }
}

// Each block's sum in static and dynamic shared memory; out[2 * blocks].
__global__ void shared_sums(const int32_t* in, int32_t* out) {
  PEARL_DYN_SMEM(int32_t, dynamic);
  __shared__ int32_t sum;
  const int t = threadIdx.x, n = blockDim.x;
  if (t == 0) sum = 0;
  dynamic[t] = in[blockIdx.x * n + t];
  __syncthreads();
  atomicAdd(&sum, dynamic[n - 1 - t]);
  __syncthreads();
  if (t != 0) return;
  int32_t total = 0;
  for (int i = 0; i < n; ++i) total += dynamic[i];
  out[2 * blockIdx.x] = sum;
  out[2 * blockIdx.x + 1] = total;
}

// What shared memory holds before anything is written: out[2], static and dynamic.
template <class T>
__global__ void uninitialised(T* out) {
  PEARL_DYN_SMEM(T, dynamic);
  __shared__ T fixed;
  out[0] = fixed;
  out[1] = dynamic[threadIdx.x];
  fixed = dynamic[threadIdx.x] = 0;
}

// state: sum, max, min, or, exchanged, claimed, counter, all of one 64-bit type but for the counter.
__global__ void atomics(const int64_t* in, unsigned long long* state, float* float_sum, unsigned* counter) {
  const int64_t value = in[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(&state[0], static_cast<unsigned long long>(value));
  atomicMax(&state[1], static_cast<unsigned long long>(value));
  atomicMin(&state[2], static_cast<unsigned long long>(value));
  atomicOr(&state[3], static_cast<unsigned long long>(value));
  atomicExch(&state[4], 7ull);
  atomicCAS(&state[5], 0ull, static_cast<unsigned long long>(value));
  atomicAdd(float_sum, static_cast<float>(value));
  atomicInc(counter, 4u);
}

// Copies rows of 8 halves through shared memory in two groups; what was copied when the first has arrived, and the end.
__global__ void async_copies(const uint16_t* in, uint16_t* first, uint16_t* both, int live) {
  PEARL_DYN_SMEM(uint16_t, tile);
  const int t = threadIdx.x, n = blockDim.x;
  cp_async_16(tile + 8 * t, in + 8 * t);
  cp_async_commit();
  cp_async_16_or_zero(tile + 8 * (n + t), in + 8 * (n + t), t < live);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  for (int i = 0; i < 16; ++i) first[16 * t + i] = tile[16 * t + i];
  __syncthreads();
  cp_async_wait<0>();
  __syncthreads();
  for (int i = 0; i < 16; ++i) both[16 * t + i] = tile[16 * t + i];
}

// One warp: A [16, 16] by rows, B [8, 16] (its transpose) and B [16, 8] give C [2][16, 8] each its own way of loading.
template <class T>
__global__ void products(const T* a, const T* b_transposed, const T* b, float* c) {
  __shared__ __align__(16) T tile[16 * 16], columns[8 * 16], rows[16 * 8];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i] = a[i];
  for (int i = lane; i < 128; i += 32) {
    columns[i] = b_transposed[i];
    rows[i] = b[i];
  }
  __syncwarp();
  uint32_t left[4], right[2];
  pearl::cuda::ldmatrix_x4(left, tile + (lane % 16) * 16 + (lane / 16) * 8);
  for (int way = 0; way < 2; ++way) {
    if (way == 0) {
      pearl::cuda::ldmatrix_x2(right, columns + (lane % 8) * 16 + (lane / 8 % 2) * 8);
    } else {
      pearl::cuda::ldmatrix_x2_trans(right, rows + (lane % 16) * 8);
    }
    float sums[4];
    float* out = c + 128 * way + (lane / 4) * 8 + 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) sums[i] = out[64 * (i / 2) + i % 2];
    pearl::cuda::mma_m16n8k16<T>(sums, left, right);
    for (int i = 0; i < 4; ++i) out[64 * (i / 2) + i % 2] = sums[i];
  }
}

// The same product of halves added `times` times to C [16, 8].
__global__ void repeated_products(const __half* a, const __half* b_transposed, float* c, int times) {
  __shared__ __align__(16) __half tile[16 * 16], columns[8 * 16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i] = a[i];
  for (int i = lane; i < 128; i += 32) columns[i] = b_transposed[i];
  __syncwarp();
  uint32_t left[4], right[2];
  pearl::cuda::ldmatrix_x4(left, tile + (lane % 16) * 16 + (lane / 16) * 8);
  pearl::cuda::ldmatrix_x2(right, columns + (lane % 8) * 16 + (lane / 8 % 2) * 8);
  float* out = c + (lane / 4) * 8 + 2 * (lane % 4);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = out[64 * (i / 2) + i % 2];
  for (int i = 0; i < times; ++i) pearl::cuda::mma_m16n8k16<__half>(sums, left, right);
  for (int i = 0; i < 4; ++i) out[64 * (i / 2) + i % 2] = sums[i];
}

// ldmatrix_x4_trans by itself: out[32][4] of in[32][8].
__global__ void transposed_matrices(const uint16_t* in, uint32_t* out) {
  __shared__ __align__(16) uint16_t tile[256];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile[i] = in[i];
  __syncwarp();
  uint32_t r[4];
  pearl::cuda::ldmatrix_x4_trans(r, tile + 8 * lane);
  for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

// out[8]: functions of bits.
__global__ void bits(uint32_t x, uint32_t y, uint32_t* out) {
  out[0] = __clz(static_cast<int>(x));
  out[1] = __ffs(static_cast<int>(x));
  out[2] = __popc(x);
  out[3] = __brev(x);
  out[4] = __umulhi(x, y);
  out[5] = __byte_perm(x, y, 0x7062);
  out[6] = __float_as_uint(__uint_as_float(x));
  out[7] = __float_as_uint(pearl::cuda::exp2_fast(__uint_as_float(y)));
}

// ---- What must abort
// ---------------------------------------------------------------------------------------------------

__global__ void divergent_barrier() {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void divergent_shuffle(int* out) {
  if (threadIdx.x < 16) {
    out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
  } else {
    out[threadIdx.x] = __any_sync(kAll, 1);
  }
}
__global__ void waits_for_a_barrier_and_a_warp(int* out) {
  if (threadIdx.x == 3) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_sync(kAll, 1, 0);
  }
}
__global__ void writes_past_the_end(int n) {
  PEARL_DYN_SMEM(unsigned char, dynamic);
  dynamic[n] = 1;
}
__global__ void misaligned_vector(const float* in, float4* out) { *out = *reinterpret_cast<const float4*>(in + 1); }

cudaError_t launched() { return cudaGetLastError(); }

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT int run_shuffles(const float* in, float* out, int threads, int argument, int width) {
  PEARL_LAUNCH(shuffles, 1, threads, 0, nullptr, in, out, argument, width);
  return launched();
}
EXPORT int run_votes(const int32_t* in, uint32_t* out, int threads, uint32_t mask) {
  PEARL_LAUNCH(votes, 1, threads, 0, nullptr, in, out, mask);
  return launched();
}
EXPORT int run_block_votes(const int32_t* in, int32_t* out, int threads) {
  PEARL_LAUNCH(block_votes, 1, threads, 0, nullptr, in, out);
  return launched();
}
EXPORT int run_shared_sums(const int32_t* in, int32_t* out, int blocks, int threads, int shared_bytes) {
  PEARL_LAUNCH(shared_sums, blocks, threads, shared_bytes, nullptr, in, out);
  return launched();
}
EXPORT int run_uninitialised(uint32_t* out) {
  const auto kernel = uninitialised<uint32_t>;
  PEARL_LAUNCH(kernel, 2, 1, 4, nullptr, out);
  return launched();
}
EXPORT int run_atomics(const int64_t* in, unsigned long long* state, float* float_sum, unsigned* counter) {
  PEARL_LAUNCH(atomics, 3, 40, 0, nullptr, in, state, float_sum, counter);
  return launched();
}
EXPORT int run_async_copies(const uint16_t* in, uint16_t* first, uint16_t* both, int threads, int live) {
  PEARL_LAUNCH(async_copies, 1, threads, 32 * threads, nullptr, in, first, both, live);
  return launched();
}
EXPORT int run_products_bf16(const void* a, const void* b_transposed, const void* b, float* c) {
  const auto kernel = products<__nv_bfloat16>;
  using T = const __nv_bfloat16*;
  PEARL_LAUNCH(kernel, 1, 32, 0, nullptr, static_cast<T>(a), static_cast<T>(b_transposed), static_cast<T>(b), c);
  return launched();
}
EXPORT int run_products_fp16(const void* a, const void* b_transposed, const void* b, float* c) {
  const auto kernel = products<__half>;
  using T = const __half*;
  PEARL_LAUNCH(kernel, 1, 32, 0, nullptr, static_cast<T>(a), static_cast<T>(b_transposed), static_cast<T>(b), c);
  return launched();
}
EXPORT int run_repeated_products(const void* a, const void* b_transposed, float* c, int times) {
  const auto* const halves = static_cast<const __half*>(b_transposed);
  PEARL_LAUNCH(repeated_products, 1, 32, 0, nullptr, static_cast<const __half*>(a), halves, c, times);
  return launched();
}
EXPORT int run_transposed_matrices(const uint16_t* in, uint32_t* out) {
  PEARL_LAUNCH(transposed_matrices, 1, 32, 0, nullptr, in, out);
  return launched();
}
EXPORT int run_bits(uint32_t x, uint32_t y, uint32_t* out) {
  PEARL_LAUNCH(bits, 1, 1, 0, nullptr, x, y, out);
  return launched();
}
EXPORT int run_launch(unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared_bytes, int allowed_bytes) {
  if (allowed_bytes > 0) {
    const auto kernel = writes_past_the_end;
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, allowed_bytes);
    if (error != cudaSuccess) return error;
  }
  PEARL_LAUNCH(writes_past_the_end, dim3(x, y, z), threads, shared_bytes, nullptr, 0);
  return launched();
}
EXPORT int run_allow_shared_memory(int bytes) {
  const auto kernel = writes_past_the_end;
  return pearl::cuda::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}
EXPORT int run_device_attribute(int attribute) {
  int value = -1;
  const cudaError_t error = pearl::cuda::device_attribute(static_cast<cudaDeviceAttr>(attribute), value);
  return error == cudaSuccess ? value : -error;
}
EXPORT int run_set_device(int device) { return cudaSetDevice(device); }
EXPORT int run_divergent_barrier() {
  PEARL_LAUNCH(divergent_barrier, 1, 32, 0, nullptr);
  return launched();
}
EXPORT int run_divergent_shuffle(int* out) {
  PEARL_LAUNCH(divergent_shuffle, 1, 32, 0, nullptr, out);
  return launched();
}
EXPORT int run_waits_for_a_barrier_and_a_warp(int* out) {
  PEARL_LAUNCH(waits_for_a_barrier_and_a_warp, 1, 32, 0, nullptr, out);
  return launched();
}
EXPORT int run_writes_past_the_end(int shared_bytes, int at) {
  PEARL_LAUNCH(writes_past_the_end, 1, 1, shared_bytes, nullptr, at);
  return launched();
}
EXPORT int run_misaligned_vector(const float* in, float* out) {
  PEARL_LAUNCH(misaligned_vector, 1, 1, 0, nullptr, in, reinterpret_cast<float4*>(out));
  return launched();
}

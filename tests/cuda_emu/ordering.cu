// What orders two accesses on a GPU, and what does not: one kernel each, for tests/emulated/test_cuda_races.py. `out`
// has zeros to begin with.
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

__global__ void block_barrier(int* out) {
  out[threadIdx.x] = 1;
  __syncthreads();
  out[blockDim.x + threadIdx.x] = out[(threadIdx.x + 40) % blockDim.x];
}
__global__ void shuffle(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
  out[blockDim.x + threadIdx.x] = out[threadIdx.x ^ 1];
}
__global__ void warp_barrier(int* out) {
  out[threadIdx.x] = 1;
  __syncwarp();
  out[blockDim.x + threadIdx.x] = out[threadIdx.x ^ 1];
}
__global__ void warp_barrier_of_other_warps(int* out) {
  out[threadIdx.x] = 1;
  __syncwarp();
  out[blockDim.x + threadIdx.x] = out[threadIdx.x ^ 32];
}
/// Lanes 0 to 15 and 16 to 31 each meet among themselves; `distance` tells whom a lane reads from.
__global__ void warp_barrier_of_halves(int* out, int distance) {
  out[threadIdx.x] = 1;
  if (threadIdx.x % 32 < 16) {
    __syncwarp(0x0000FFFFu);
  } else {
    __syncwarp(0xFFFF0000u);
  }
  out[blockDim.x + threadIdx.x] = out[threadIdx.x ^ distance];
}
/// Warps 0 and 1 meet at barrier 1, 2 and 3 at barrier 2.
__global__ void named_barriers(int* out, int distance) {
  out[threadIdx.x] = 1;
  pearl::cuda::named_barrier(1 + static_cast<int>(threadIdx.x / 64), 64);
  out[blockDim.x + threadIdx.x] = out[threadIdx.x ^ distance];
}
__global__ void atomics_and_reads(int* out) {
  atomicAdd(&out[0], 1);
  out[1 + threadIdx.x] = out[0];
}
__global__ void atomics_and_volatile_reads(int* out) {
  atomicAdd(&out[0], 1);
  const volatile int* const seen = out;
  out[1 + threadIdx.x] = *seen;
}
/// Block 0 writes and counts itself, block 1 reads if it sees that. Bit 0, 1: with the fence of the writer, the reader.
__global__ void message(int* out, int fences) {
  if (blockIdx.x == 0) {
    out[0] = 1;
    if (fences & 1) __threadfence();
    atomicAdd(&out[1], 1);
  } else if (atomicAdd(&out[1], 1) == 1) {
    if (fences & 2) __threadfence();
    out[2] = out[0];
  }
}
__global__ void blocks_write_the_same(int* out) { out[threadIdx.x] = 1; }
__global__ void own_shared_memory(int* out) {
  __shared__ int fixed[32];
  PEARL_DYN_SMEM(int, dynamic);
  fixed[threadIdx.x] = dynamic[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[32 * blockIdx.x + threadIdx.x] = fixed[threadIdx.x] + dynamic[threadIdx.x];
}
/// Thread t copies, and reads what it copied itself, or what its neighbour did.
__global__ void async_copy(int* out, int wait, int barrier, int distance) {
  __shared__ __align__(16) int tile[4 * 32];
  pearl::cuda::cp_async_16(tile + 4 * threadIdx.x, out + 4 * threadIdx.x);
  pearl::cuda::cp_async_commit();
  if (wait) pearl::cuda::cp_async_wait<0>();
  if (barrier) __syncwarp();
  out[4 * 32 + threadIdx.x] = tile[4 * (threadIdx.x ^ distance)];
}
/// A copy over what others may still read.
__global__ void async_copy_over(int* out, int barrier) {
  __shared__ __align__(16) int tile[4 * 32];
  for (int i = 0; i < 4; ++i) tile[4 * threadIdx.x + i] = 1;
  __syncwarp();
  const int read = tile[4 * (threadIdx.x ^ 1)];
  if (barrier) __syncwarp();
  pearl::cuda::cp_async_16(tile + 4 * threadIdx.x, out + 4 * threadIdx.x);
  pearl::cuda::cp_async_commit();
  pearl::cuda::cp_async_wait<0>();
  out[4 * 32 + threadIdx.x] = read;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))
#define RUN(kernel, blocks, threads, shared_bytes, ...)                      \
  PEARL_LAUNCH(kernel, blocks, threads, shared_bytes, nullptr, __VA_ARGS__); \
  return cudaGetLastError()

EXPORT int run_block_barrier(int* out) { RUN(block_barrier, 1, 128, 0, out); }
EXPORT int run_shuffle(int* out) { RUN(shuffle, 1, 32, 0, out); }
EXPORT int run_warp_barrier(int* out) { RUN(warp_barrier, 1, 64, 0, out); }
EXPORT int run_warp_barrier_of_other_warps(int* out) { RUN(warp_barrier_of_other_warps, 1, 64, 0, out); }
EXPORT int run_warp_barrier_of_halves(int* out, int distance) { RUN(warp_barrier_of_halves, 1, 64, 0, out, distance); }
EXPORT int run_named_barriers(int* out, int distance) { RUN(named_barriers, 1, 128, 0, out, distance); }
EXPORT int run_atomics_and_reads(int* out) { RUN(atomics_and_reads, 1, 32, 0, out); }
EXPORT int run_atomics_and_volatile_reads(int* out) { RUN(atomics_and_volatile_reads, 1, 32, 0, out); }
EXPORT int run_message(int* out, int fences) { RUN(message, 2, 1, 0, out, fences); }
EXPORT int run_blocks_write_the_same(int* out, int blocks) { RUN(blocks_write_the_same, blocks, 32, 0, out); }
EXPORT int run_two_launches(int* out) {
  PEARL_LAUNCH(blocks_write_the_same, 1, 32, 0, nullptr, out);
  RUN(block_barrier, 1, 128, 0, out);
}
EXPORT int run_own_shared_memory(int* out) { RUN(own_shared_memory, 3, 32, 128, out); }
EXPORT int run_async_copy(int* out, int wait, int barrier, int distance) {
  RUN(async_copy, 1, 32, 0, out, wait, barrier, distance);
}
EXPORT int run_async_copy_over(int* out, int barrier) { RUN(async_copy_over, 1, 32, 0, out, barrier); }

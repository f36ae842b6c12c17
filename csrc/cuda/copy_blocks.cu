// copy_blocks: a block moves stretches of one pair's page, 64 bytes a thread in flight.
#include "cuda/convert.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace pearl::cuda {
namespace {

constexpr int kThreads = 256, kUnits = 4;
constexpr int64_t kMaxGridY = 65535;

/// Unit: what one access moves. Pages that the cache does not have are not followed.
template <class Unit>
__global__ void __launch_bounds__(kThreads) copy_blocks_kernel(CopyBlocksParams p) {
  const int64_t source = p.pairs[2 * int64_t{blockIdx.x}], destination = p.pairs[2 * int64_t{blockIdx.x} + 1];
  if (source < 0 || source >= p.pages || destination < 0 || destination >= p.pages || source == destination) return;
  const int64_t units = p.page_bytes / static_cast<int64_t>(sizeof(Unit));
  const Unit* from = static_cast<const Unit*>(p.cache) + source * units;
  Unit* to = static_cast<Unit*>(p.cache) + destination * units;
  const int64_t step = int64_t{kThreads} * kUnits * gridDim.y;
  for (int64_t at = int64_t{kThreads} * kUnits * blockIdx.y + threadIdx.x; at < units; at += step) {
    Unit held[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (at + i * kThreads < units) held[i] = from[at + i * kThreads];
    }
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (at + i * kThreads < units) to[at + i * kThreads] = held[i];
    }
  }
}

template <class Unit>
cudaError_t launch(const CopyBlocksParams& p, cudaStream_t stream) {
  const int64_t stretch = int64_t{kThreads} * kUnits * sizeof(Unit);
  const int64_t stretches = (p.page_bytes + stretch - 1) / stretch;
  const dim3 grid(static_cast<unsigned>(p.count), static_cast<unsigned>(stretches < kMaxGridY ? stretches : kMaxGridY));
  const auto kernel = copy_blocks_kernel<Unit>;
  return PEARL_LAUNCH(kernel, grid, kThreads, 0, stream, p);
}

}  // namespace

cudaError_t copy_blocks(const CopyBlocksParams& p, cudaStream_t stream) {
  if (p.count < 0 || p.count > INT32_MAX || p.page_bytes < 0) return cudaErrorInvalidValue;
  if (p.count == 0 || p.page_bytes == 0) return cudaSuccess;
  const bool vectors = aligned(sizeof(uint4), p.cache) && p.page_bytes % static_cast<int64_t>(sizeof(uint4)) == 0;
  return vectors ? launch<uint4>(p, stream) : launch<uint8_t>(p, stream);
}

}  // namespace pearl::cuda

// verify_attention: checks, the plan, and the choice of the kernels' template arguments.
#include "cuda/attention_fma.cuh"
#include "cuda/attention_merge.cuh"
#include "cuda/attention_mma.cuh"
#include "cuda/attention_plan.cuh"
#include "cuda/convert.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace pearl::cuda {
namespace {

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

/// Whether the kernels can run it: head widths, groups, alignment of what moves sixteen bytes at a time, and counts of
/// rows that fit their int32 indices.
bool supported(const AttentionParams& p) {
  if (p.head_dim < 8 || p.head_dim > 256 || p.head_dim % 8 != 0) return false;
  if (p.kv_heads < 1 || p.query_heads < 1 || p.query_heads % p.kv_heads != 0 || p.page_size < 1) return false;
  if (!aligned(16, p.k_cache, p.v_cache, p.out) || p.page_size > INT32_MAX) return false;
  return p.tokens * p.query_heads <= INT32_MAX && p.sequences * p.kv_heads <= INT32_MAX / 2;
}

/// Launches a kernel with a ring of tiles. `beside` are the bytes of shared memory before the ring, `least` those that
/// the kernel needs whatever the ring.
cudaError_t launch(void (*kernel)(AttentionTask), AttentionTask task, const Device& device, int rows, int threads,
                   int64_t beside, int64_t stage, int64_t least, cudaStream_t stream) {
  task.stages = ring_stages(beside, stage, device);
  const int64_t bytes = std::max(beside + task.stages * stage, least);
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  error =
      cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  const int64_t blocks = (task.p.tokens * task.group / rows + task.p.sequences) * task.p.kv_heads;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(task.splits));
  PEARL_LAUNCH(kernel, grid, dim3(threads), bytes, stream, task);
  return cudaGetLastError();
}

template <class T, int kWidth, int kRowTiles, int kTeams>
cudaError_t launch_mma(const AttentionTask& task, const Device& device, cudaStream_t stream) {
  constexpr int kRows = 16 * kRowTiles * kTeams;
  return launch(attend_mma<T, kWidth, kRowTiles, kTeams>, task, device, kRows, 32 * kKeyWarps * kTeams,
                kMmaQueryBytes<T, kWidth, kRowTiles, kTeams>, kMmaStageBytes<T, kWidth>,
                sizeof(MergeBuffer<kWidth, kRowTiles, kTeams>), stream);
}

template <class T, int kWidth>
cudaError_t launch_mma_rows(const AttentionTask& task, const Device& device, cudaStream_t stream) {
  const int rows = block_rows(task.p);
  if (rows == 16) return launch_mma<T, kWidth, 1, 1>(task, device, stream);
  if constexpr (kWidth > 128) {
    return launch_mma<T, kWidth, 1, 2>(task, device, stream);
  } else {
    return rows == 32 ? launch_mma<T, kWidth, 2, 1>(task, device, stream)
                      : launch_mma<T, kWidth, 2, 2>(task, device, stream);
  }
}

template <class T>
cudaError_t launch_mma_width(const AttentionTask& task, const Device& device, cudaStream_t stream) {
  if (task.p.head_dim <= 64) return launch_mma_rows<T, 64>(task, device, stream);
  if (task.p.head_dim <= 128) return launch_mma_rows<T, 128>(task, device, stream);
  return launch_mma_rows<T, 256>(task, device, stream);
}

template <class T, int kWidth>
cudaError_t launch_fma(const AttentionTask& task, const Device& device, cudaStream_t stream) {
  return launch(attend_fma<T, kWidth>, task, device, kFmaRows, 32 * kFmaWarps, kFmaOtherBytes<kWidth>,
                kFmaStageBytes<T, kWidth>, 0, stream);
}

template <class T>
cudaError_t launch_fma_width(const AttentionTask& task, const Device& device, cudaStream_t stream) {
  if (task.p.head_dim <= 64) return launch_fma<T, 64>(task, device, stream);
  if (task.p.head_dim <= 128) return launch_fma<T, 128>(task, device, stream);
  return launch_fma<T, 256>(task, device, stream);
}

cudaError_t launch_attend(const AttentionTask& task, const Device& device, cudaStream_t stream) {
  const bool same = task.p.q_dtype == task.p.cache_dtype;
  switch (task.p.cache_dtype) {
    case DType::kBFloat16:
      return same ? launch_mma_width<__nv_bfloat16>(task, device, stream)
                  : launch_fma_width<__nv_bfloat16>(task, device, stream);
    case DType::kFloat16:
      return same ? launch_mma_width<__half>(task, device, stream) : launch_fma_width<__half>(task, device, stream);
    default:
      return launch_fma_width<float>(task, device, stream);
  }
}

}  // namespace

int64_t verify_attention_workspace(const AttentionParams& p) {
  Device device;
  if (p.tokens == 0 || !supported(p) || current_device(device) != cudaSuccess) return 0;
  const KeySplits splits = split_keys(p, device);
  return splits.count == 1 ? 0 : p.tokens * partial_bytes(p, splits.count);
}

cudaError_t verify_attention(const AttentionParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.sequences == 0) return cudaSuccess;
  if (!supported(p)) return cudaErrorInvalidValue;
  Device device;
  if (const cudaError_t error = current_device(device); error != cudaSuccess) return error;
  const KeySplits splits = split_keys(p, device);

  AttentionTask task = {};
  task.p = p;
  task.group = static_cast<int>(p.query_heads / p.kv_heads);
  task.window = static_cast<int>(p.window > 0 ? std::min<int64_t>(p.window, INT32_MAX) : INT32_MAX);
  task.slot_bytes = p.kv_heads * p.head_dim * element_bytes(p.cache_dtype);
  task.split_keys = static_cast<int>(splits.keys);
  task.splits = static_cast<int>(splits.count);
  task.aligned_q = aligned(16, p.q) && p.q_stride * element_bytes(p.q_dtype) % 16 == 0;
  if (task.splits > 1) {
    if (p.workspace.bytes < p.tokens * partial_bytes(p, splits.count) || !aligned(16, p.workspace.data)) {
      return cudaErrorInvalidValue;
    }
    task.partial_sum = static_cast<float*>(p.workspace.data);
    const int64_t rows = p.tokens * p.query_heads * splits.count;
    task.partial_row = reinterpret_cast<float2*>(task.partial_sum + rows * p.head_dim);
  }
  const cudaError_t error = launch_attend(task, device, stream);
  if (error != cudaSuccess || task.splits == 1) return error;
  PEARL_LAUNCH(merge_splits, dim3(static_cast<unsigned>(p.tokens * p.query_heads)), dim3(32 * kMergeWarps), 0, stream,
               task);
  return cudaGetLastError();
}

}  // namespace pearl::cuda

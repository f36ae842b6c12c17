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
  if (!aligned(16, p.k_cache, p.v_cache, p.out) || p.page_size > INT32_MAX || p.most_rows < 0) return false;
  return p.tokens * p.query_heads <= INT32_MAX && p.sequences * p.kv_heads <= INT32_MAX / 2;
}

/// A ring of tiles in dynamic shared memory: bytes before it, of a stage, and those that the kernel needs whatever the
/// ring; and how many blocks a multiprocessor is meant to run at a time.
struct Ring {
  int64_t beside, stage, least;
  int resident;
};

cudaError_t launch(void (*kernel)(AttentionTask), AttentionTask task, const Cut& cut, int threads, const Ring& ring,
                   cudaStream_t stream) {
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  task.stages = ring_stages(ring.beside, ring.stage, ring.resident, device);
  const int64_t bytes = std::max(ring.beside + task.stages * ring.stage, ring.least);
  error = allow_shared_memory(reinterpret_cast<const void*>(kernel), static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(cut.blocks), static_cast<unsigned>(cut.strides()));
  return PEARL_LAUNCH(kernel, grid, dim3(threads), bytes, stream, task);
}

template <class T, int kWidth, int kRowTiles, int kTeams>
cudaError_t launch_mma(const AttentionTask& task, const Cut& cut, cudaStream_t stream) {
  const Ring ring = {kMmaQueryBytes<T, kWidth, kRowTiles, kTeams>, kMmaStageBytes<T, kWidth>,
                     sizeof(MergeBuffer<kWidth, kRowTiles, kTeams>), kMmaResident<kTeams>};
  return launch(attend_mma<T, kWidth, kRowTiles, kTeams>, task, cut, 32 * kKeyWarps * kTeams, ring, stream);
}

template <class T, int kWidth>
cudaError_t launch_mma_rows(const AttentionTask& task, const Cut& cut, cudaStream_t stream) {
  if (cut.rows == 16) return launch_mma<T, kWidth, 1, 1>(task, cut, stream);
  if constexpr (kWidth > 128) {
    return launch_mma<T, kWidth, 1, 2>(task, cut, stream);
  } else {
    return cut.rows == 32 ? launch_mma<T, kWidth, 2, 1>(task, cut, stream)
                          : launch_mma<T, kWidth, 2, 2>(task, cut, stream);
  }
}

template <class T>
cudaError_t launch_mma_width(const AttentionTask& task, const Cut& cut, cudaStream_t stream) {
  if (task.p.head_dim <= 64) return launch_mma_rows<T, 64>(task, cut, stream);
  if (task.p.head_dim <= 128) return launch_mma_rows<T, 128>(task, cut, stream);
  return launch_mma_rows<T, 256>(task, cut, stream);
}

template <class T, int kWidth>
cudaError_t launch_fma(const AttentionTask& task, const Cut& cut, cudaStream_t stream) {
  const Ring ring = {kFmaOtherBytes<kWidth>, kFmaStageBytes<T, kWidth>, 0, kFmaResident};
  return launch(attend_fma<T, kWidth>, task, cut, 32 * kFmaWarps, ring, stream);
}

template <class T>
cudaError_t launch_fma_width(const AttentionTask& task, const Cut& cut, cudaStream_t stream) {
  if (task.p.head_dim <= 64) return launch_fma<T, 64>(task, cut, stream);
  if (task.p.head_dim <= 128) return launch_fma<T, 128>(task, cut, stream);
  return launch_fma<T, 256>(task, cut, stream);
}

cudaError_t launch_attend(const AttentionTask& task, const Cut& cut, cudaStream_t stream) {
  const bool products = on_tensor_cores(task.p);
  switch (task.p.cache_dtype) {
    case DType::kBFloat16:
      return products ? launch_mma_width<__nv_bfloat16>(task, cut, stream)
                      : launch_fma_width<__nv_bfloat16>(task, cut, stream);
    case DType::kFloat16:
      return products ? launch_mma_width<__half>(task, cut, stream) : launch_fma_width<__half>(task, cut, stream);
    default:
      return launch_fma_width<float>(task, cut, stream);
  }
}

/// Whether the caller's counters do. If not, the workspace has some behind the partial results, which are set to zero
/// first: one more node of a graph.
bool counters_suffice(const AttentionParams& p, const Cut& cut) {
  return p.counters != nullptr && cut.counters() <= p.counter_count;
}

int64_t workspace_bytes(const AttentionParams& p, const Cut& cut) {
  const int64_t counters = counters_suffice(p, cut) ? 0 : cut.counters() * static_cast<int64_t>(sizeof(uint32_t));
  return cut.partial_bytes(p) + counters;
}

/// Divides the workspace among partial results and, if need be, counters.
cudaError_t place_partials(const AttentionParams& p, const Cut& cut, AttentionTask& task, cudaStream_t stream) {
  if (cut.splits == 1) return cudaSuccess;
  if (p.workspace.bytes < workspace_bytes(p, cut) || !aligned(16, p.workspace.data)) return cudaErrorInvalidValue;
  task.partial_sum = static_cast<float*>(p.workspace.data);
  task.partial_row = reinterpret_cast<float2*>(task.partial_sum + cut.sums(p));
  task.counters = p.counters;
  if (counters_suffice(p, cut)) return cudaSuccess;
  task.counters = reinterpret_cast<uint32_t*>(static_cast<char*>(p.workspace.data) + cut.partial_bytes(p));
  return cudaMemsetAsync(task.counters, 0, cut.counters() * sizeof(uint32_t), stream);
}

}  // namespace

int64_t verify_attention_workspace(const AttentionParams& p) {
  if (p.tokens == 0 || p.sequences == 0 || !supported(p)) return 0;
  return workspace_bytes(p, cut_attention(p));
}

int64_t verify_attention_shared(DType dtype, int64_t head_dim) {
  const auto ring = [](int64_t beside, int64_t stage) { return beside + 2 * stage; };
  if (dtype == DType::kFloat32) {
    if (head_dim <= 64) return ring(kFmaOtherBytes<64>, kFmaStageBytes<float, 64>);
    if (head_dim <= 128) return ring(kFmaOtherBytes<128>, kFmaStageBytes<float, 128>);
    return ring(kFmaOtherBytes<256>, kFmaStageBytes<float, 256>);
  }
  if (head_dim <= 64) return ring(kMmaQueryBytes<__half, 64, 2, 2>, kMmaStageBytes<__half, 64>);
  if (head_dim <= 128) return ring(kMmaQueryBytes<__half, 128, 2, 2>, kMmaStageBytes<__half, 128>);
  return ring(kMmaQueryBytes<__half, 256, 1, 2>, kMmaStageBytes<__half, 256>);
}

cudaError_t verify_attention(const AttentionParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.sequences == 0) return cudaSuccess;
  if (!supported(p)) return cudaErrorInvalidValue;
  const Cut cut = cut_attention(p);
  if (cut.strides() > kMostStrides) return cudaErrorInvalidValue;

  AttentionTask task = {};
  task.p = p;
  task.group = static_cast<int>(p.query_heads / p.kv_heads);
  task.window = static_cast<int>(p.window > 0 ? std::min<int64_t>(p.window, INT32_MAX) : INT32_MAX);
  task.slot_bytes = p.kv_heads * p.head_dim * element_bytes(p.cache_dtype);
  task.capacity = static_cast<int>(cut.capacity);
  task.split_keys = split_keys(p.kv_heads);
  task.splits = static_cast<int>(cut.splits);
  task.walk = static_cast<int>(cut.walk);
  task.group_slot = cut.walk > 1 ? 0 : task.splits;
  task.slots = static_cast<int>(cut.slots());
  task.counters_of_block = static_cast<int>(cut.counters_of_block());
  task.partial_by_sequence = cut.partial_by_sequence;
  task.aligned_q = aligned(16, p.q) && p.q_stride * element_bytes(p.q_dtype) % 16 == 0;
  const cudaError_t error = place_partials(p, cut, task, stream);
  return error == cudaSuccess ? launch_attend(task, cut, stream) : error;
}

}  // namespace pearl::cuda

// verify: drafted tokens against the target's rows, up to the first that fails. Up to five kernels, all launched
// whatever the data says: blocks that find nothing to do leave at once.
//
//   verify_statistics   every row: largest logit, sum of exp, greedy token, draw without cuts
//   verify_cutoff       rows that are cut: cutoff and kept mass. Rejection rule: which row of each request fails
//   the same two        rejection rule: the draft's row at each request's rejected token
//   verify_draw         rejection rule: replacement or bonus token of each request; coupled rule: rows that are cut
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/verify_cutoff.cuh"
#include "cuda/verify_draw.cuh"
#include "cuda/verify_plan.cuh"
#include "cuda/verify_statistics.cuh"

namespace pearl::cuda {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 23;  // of a vocabulary: what a row's mass in fixed point can hold
constexpr int64_t kMostSlots = 65535;              // of a grid's second dimension

bool is_dtype(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16; }

bool is_view(const LogitsView& view, int64_t vocab_size) {
  return is_dtype(view.dtype) && view.rows >= 0 && (view.rows <= 1 || view.stride >= vocab_size) &&
         (view.rows == 0 || view.data != nullptr);
}

bool can_run(const VerifyParams& p) {
  if (p.vocab_size < 1 || p.vocab_size > kMostTokens || p.requests < 0 || p.requests > kMostSlots) return false;
  if (p.rule != Rule::kRejection && p.rule != Rule::kCoupled) return false;
  if (!is_view(p.logits, p.vocab_size) || p.logits.rows > kMostSlots) return false;
  if (p.draft_logits.data == nullptr) return true;
  return is_view(p.draft_logits, p.vocab_size) && p.draft_temperature != nullptr;
}

/// Both passes that make a stage's rows known.
template <Stage kStage>
cudaError_t launch_passes(const Plan& plan, int splits, int slots, cudaStream_t stream) {
  const auto statistics = verify_statistics<kStage>;
  const cudaError_t error =
      PEARL_LAUNCH(statistics, dim3(plan.tiles, slots), dim3(kStatisticsThreads), 0, stream, plan);
  if (error != cudaSuccess) return error;
  return PEARL_LAUNCH(verify_cutoff, dim3(splits, slots), dim3(kCutoffThreads), 0, stream, plan, kStage);
}

cudaError_t launch_draws(const Plan& plan, cudaStream_t stream) {
  if (plan.p.rule == Rule::kCoupled) {
    return PEARL_LAUNCH(verify_draw_coupled, dim3(plan.draw_blocks, plan.rows), dim3(kDrawThreads), 0, stream, plan);
  }
  return PEARL_LAUNCH(verify_draw_rejected, dim3(plan.draw_blocks, plan.requests), dim3(kDrawThreads), 0, stream, plan);
}

/// No request has a row.
cudaError_t answer_without_rows(const VerifyParams& p, cudaStream_t stream) {
  const cudaError_t error = cudaMemsetAsync(p.accepted, 0, p.requests * sizeof(*p.accepted), stream);
  if (error != cudaSuccess) return error;
  return cudaMemsetAsync(p.next_token, 0xFF, p.requests * sizeof(*p.next_token), stream);
}

}  // namespace

int64_t verify_workspace(const VerifyParams& p) { return can_run(p) ? make_plan(p, nullptr).workspace_bytes : 0; }

cudaError_t verify(const VerifyParams& p, cudaStream_t stream) {
  if (!can_run(p)) return cudaErrorInvalidValue;
  if (p.requests == 0) return cudaSuccess;
  if (p.logits.rows == 0) return answer_without_rows(p, stream);
  const Plan plan = make_plan(p, p.workspace.data);
  if (p.workspace.bytes < plan.workspace_bytes || reinterpret_cast<uintptr_t>(p.workspace.data) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  cudaError_t error = launch_passes<Stage::kTarget>(plan, plan.target_splits, plan.rows, stream);
  if (error == cudaSuccess && p.rule == Rule::kRejection && p.draft_logits.data != nullptr) {
    error = launch_passes<Stage::kDraft>(plan, plan.draft_splits, plan.requests, stream);
  }
  return error == cudaSuccess ? launch_draws(plan, stream) : error;
}

}  // namespace pearl::cuda

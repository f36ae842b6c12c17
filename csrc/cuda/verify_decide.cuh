// The verdict on a request, once all its rows are known: how many drafted tokens hold, and what the first that does not
// is replaced by.
#pragma once

#include <cuda_runtime.h>

#include "cuda/block.cuh"
#include "cuda/verify_task.cuh"

namespace pearl::cuda {

/// What other blocks of this kernel wrote before they arrived.
__device__ __forceinline__ Summary read_summary(const Summary* summary) {
  const float4 s = __ldcg(reinterpret_cast<const float4*>(summary));
  return {s.x, s.y, s.z, __float_as_int(s.w)};
}

/// Whether the token drafted at `row` passes the test of the rejection rule.
__device__ inline bool is_accepted(const Plan& plan, int request, int row, int64_t drafted, const Summary& summary) {
  if (drafted >= plan.vocab_size) return false;
  const Distribution p = make_distribution(plan.p.sampling.temperature[request], summary);
  const float log_q = plan.p.draft_logprobs == nullptr ? 0.0f : plan.p.draft_logprobs[row];
  const float u = uniform_one(noise_key(plan, request, row, kAcceptStream));
  return u < expf(p.log_probability(logit(target_row(plan, row), drafted)) - log_q);
}

struct RowVerdict {
  bool holds;
  Action action;  // if it does not
  int64_t token;  // kDone: what takes the drafted token's place
};

__device__ inline RowVerdict test_row(const Plan& plan, int request, int row) {
  const Summary summary = read_summary(&plan.target[row]);
  const int64_t drafted = plan.p.draft_tokens[row];
  const Task task = target_task(plan, row, request);
  if (!task.greedy && !task.draws) {
    return {is_accepted(plan, request, row, drafted, summary), kReplace, -1};
  }
  if (task.draws && task.is_cut() && plan.p.rule == Rule::kRejection) return {false, kDrawBonus, -1};
  const int64_t token = max(summary.token, 0);  // a row of NaNs or infinities has no distribution
  return {token == drafted, kDone, token};
}

/// By one warp, a row to a lane.
__device__ inline void decide(const Plan& plan, int request) {
  const int begin = plan.p.row_start[request], end = plan.p.row_start[request + 1];
  for (int first = begin; first < end; first += kWarpLanes) {
    const int row = first + static_cast<int>(threadIdx.x) % kWarpLanes;
    RowVerdict verdict = {true, kDone, -1};
    if (row < end) verdict = test_row(plan, request, row);
    const unsigned failed = __ballot_sync(kAllLanes, !verdict.holds);
    if (failed == 0) continue;
    if (row != first + __ffs(static_cast<int>(failed)) - 1) return;
    plan.ruling[request] = {row, verdict.action};
    plan.p.accepted[request] = row - begin;
    plan.p.next_token[request] = verdict.token;
    return;
  }
  if (threadIdx.x == 0) plan.p.accepted[request] = end - begin;  // no more to say: next_token is -1 from the start
}

/// One of the request's rows is known. The block that brings the last one decides. All threads call it.
__device__ inline void finish_row(const Plan& plan, int request, bool* flag) {
  const int rows = plan.p.row_start[request + 1] - plan.p.row_start[request];
  if (!last_to_arrive(&plan.request_counter[request], rows, flag)) return;
  if (threadIdx.x < kWarpLanes) decide(plan, request);
}

}  // namespace pearl::cuda

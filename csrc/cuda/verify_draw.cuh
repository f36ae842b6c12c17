// Third pass: draws that need a row's distribution. Under the rejection rule one for each request, the replacement of
// the rejected token or a bonus token; under the coupled rule one for each row that is cut.
#pragma once

#include <cuda_runtime.h>

#include "cuda/philox.cuh"
#include "cuda/verify_decide.cuh"
#include "cuda/verify_task.cuh"

namespace pearl::cuda {

struct DrawShared {
  Wide wides[kDrawThreads / kWarpLanes];
  bool last;
};

/// What is drawn from: p, p without a token, or norm(max(p - q, 0)).
struct Weights {
  LogitsRow p_row;
  Distribution p;
  int32_t excluded;  // -1: none
  bool minus_q;
  LogitsRow q_row;
  Distribution q;

  __device__ Weights(const LogitsRow& row, const Distribution& p, int32_t excluded = -1)
      : p_row(row), p(p), excluded(excluded), minus_q(false), q_row(row), q(p) {}

  /// At most log_p.
  __device__ float log_weight(float log_p, float q_logit, int token) const {
    if (token == excluded) return kMinusInfinity;
    if (!minus_q) return log_p;
    // Not contracted, so that equal distributions leave nothing.
    const float difference = __fsub_rn(expf(log_p), expf(q.log_probability(q_logit)));
    return difference > 0.0f ? logf(difference) : kMinusInfinity;
  }
};

/// The winner among the tokens [begin, end), packed with its score. All threads call it and get the result.
/// A thread has `kVectors` on their way at once.
template <int kVectors>
__device__ inline Wide draw_from(const Weights& weights, const NoiseKey& key, int begin, int end, Wide* scratch) {
  LogitsRow p_row = weights.p_row, q_row = weights.q_row;
  p_row.size = q_row.size = min(p_row.size, end);
  Race race(kMinusInfinity);
#pragma unroll 1
  for (int first = begin; first < end; first += kVectors * kDrawTile) {
    const int mine = first + static_cast<int>(threadIdx.x) * kVector;
    float x[kVectors][kVector], q[kVectors][kVector];
    load(p_row, mine, kDrawTile, x);
    if (weights.minus_q) load(q_row, mine, kDrawTile, q);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int token = mine + v * kDrawTile;
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        float log_p[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) log_p[j] = weights.p.log_probability(x[v][i + j]);
        race.enter(key, token + i, log_p,
                   [&](int j) { return weights.log_weight(log_p[j], q[v][i + j], token + i + j); });
      }
    }
  }
  return block_reduce<kDrawThreads>(race.packed(), scratch, Larger());
}

/// This block's part of a draw. True for the row's last block, which then has the winner of the whole row.
__device__ inline bool draw_from_row(const Plan& plan, const Weights& weights, const NoiseKey& key, int slot,
                                     DrawShared& shared, Wide* winner) {
  const int length = plan.draw_tiles * kDrawTile, begin = static_cast<int>(blockIdx.x) * length;
  *winner = plan.draw_tiles == 1 ? draw_from<1>(weights, key, begin, begin + length, shared.wides)
                                 : draw_from<kDrawVectors>(weights, key, begin, begin + length, shared.wides);
  Wide* const winners = reinterpret_cast<Wide*>(plan.tile) + static_cast<int64_t>(slot) * gridDim.x;
  if (threadIdx.x == 0) winners[blockIdx.x] = *winner;
  if (!last_to_arrive(&plan.slot_counter[slot], gridDim.x, &shared.last)) return false;
  Wide best = 0;
  for (int i = threadIdx.x; i < static_cast<int>(gridDim.x); i += kDrawThreads)
    best = Larger()(best, __ldcg(&winners[i]));
  *winner = block_reduce<kDrawThreads>(best, shared.wides, Larger());
  return true;
}

/// Weights of the replacement of the token drafted at `row`.
__device__ inline Weights residual(const Plan& plan, int request, int row, const Distribution& p) {
  const LogitsRow p_row = target_row(plan, row);
  const int64_t drafted = plan.p.draft_tokens[row];
  const Task q = draft_task(plan, request);
  if (q.request < 0) return Weights(p_row, p, drafted < plan.vocab_size ? static_cast<int32_t>(drafted) : -1);
  if (q.greedy) return Weights(p_row, p, max(plan.draft[request].token, 0));
  Weights weights(p_row, p);
  weights.minus_q = true;
  weights.q_row = q.row;
  weights.q = make_distribution(q.temperature, plan.draft[request]);
  return weights;
}

/// Grid: (parts of a row, requests).
__global__ void __launch_bounds__(kDrawThreads, 2) verify_draw_rejected(const Plan plan) {
  __shared__ DrawShared shared;
  const int request = blockIdx.y;
  const Ruling ruling = plan.ruling[request];
  if (ruling.action == kDone) return;
  const Distribution p = make_distribution(plan.p.sampling.temperature[request], plan.target[ruling.row]);
  const Weights plain(target_row(plan, ruling.row), p);
  const bool replaces = ruling.action == kReplace;
  const Weights weights = replaces ? residual(plan, request, ruling.row, p) : plain;
  const NoiseKey key = noise_key(plan, request, ruling.row, replaces ? kResidualStream : kSampleStream);
  Wide winner;
  if (!draw_from_row(plan, weights, key, request, shared, &winner)) return;
  if (winner == 0 && replaces) {  // no residual: from p
    winner = draw_from<kDrawVectors>(plain, key, 0, plan.vocab_size, shared.wides);
  }
  if (threadIdx.x == 0) plan.p.next_token[request] = max(token_of(winner), 0);
}

/// Grid: (parts of a row, rows).
__global__ void __launch_bounds__(kDrawThreads, 2) verify_draw_coupled(const Plan plan) {
  __shared__ DrawShared shared;
  const int row = blockIdx.y;
  const Task task = target_task(plan, row, plan.request_of_row[row]);
  const bool draws = task.draws && task.is_cut();
  if (task.request < 0 || (!draws && blockIdx.x != 0)) return;
  if (draws) {
    const Distribution p = make_distribution(task.temperature, plan.target[row]);
    const Weights weights(task.row, p);
    Wide winner;
    if (!draw_from_row(plan, weights, noise_key(plan, task.request, row, kSampleStream), row, shared, &winner)) return;
    if (threadIdx.x == 0) plan.target[row].token = token_of(winner);
  }
  finish_row(plan, task.request, &shared.last);
}

}  // namespace pearl::cuda

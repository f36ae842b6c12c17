// What is wanted of the row in a slot, and the row as its request's distribution.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/verify_plan.cuh"

namespace pearl::cuda {

inline constexpr float kInfinity = __builtin_huge_valf(), kMinusInfinity = -kInfinity;

struct Task {
  int32_t request;  // -1: nothing is wanted
  LogitsRow row;
  float temperature;
  bool greedy;  // the rest is then off
  bool draws;   // the row's own token is drawn, with stream SAMPLE
  int32_t top_k;
  float top_p, min_p;  // 0, 1, 0: off

  __device__ bool is_cut() const { return top_k > 0 || top_p < 1.0f || min_p > 0.0f; }
};

__device__ __forceinline__ Task make_task(const Plan& plan, int request, const LogitsRow& row, float temperature) {
  const SamplingView& s = plan.p.sampling;
  Task task = {request, row, temperature, temperature <= 0.0f, false, 0, 1.0f, 0.0f};
  if (task.greedy) return task;
  task.top_k = s.top_k[request] < plan.vocab_size ? s.top_k[request] : 0;
  task.top_p = s.top_p[request];
  task.min_p = s.min_p[request];
  return task;
}

__device__ __forceinline__ LogitsRow target_row(const Plan& plan, int row) {
  return row_of(plan.p.logits, plan.logits_aligned, row, plan.vocab_size);
}

/// A bonus row, or any row under the coupled rule.
__device__ __forceinline__ bool draws_its_token(const Plan& plan, int row) {
  return plan.p.rule == Rule::kCoupled || plan.p.draft_tokens[row] < 0;
}

__device__ __forceinline__ Task target_task(const Plan& plan, int row, int request) {
  Task task = {};
  task.request = request;
  if (request < 0) return task;
  task = make_task(plan, request, target_row(plan, row), plan.p.sampling.temperature[request]);
  task.draws = !task.greedy && draws_its_token(plan, row);
  return task;
}

/// Row of q's logits for the token drafted at `row`; -1: q is the point mass on it.
__device__ __forceinline__ int draft_row_of(const Plan& plan, int row) {
  if (plan.p.draft_rows == nullptr || plan.p.draft_logits.data == nullptr) return -1;
  const int draft_row = plan.p.draft_rows[row];
  return draft_row < plan.p.draft_logits.rows ? draft_row : -1;
}

__device__ __forceinline__ Task draft_task(const Plan& plan, int request) {
  const Ruling ruling = plan.ruling[request];
  Task nothing = {};
  nothing.request = -1;
  if (ruling.action != kReplace) return nothing;
  const int draft_row = draft_row_of(plan, ruling.row);
  if (draft_row < 0) return nothing;
  const LogitsRow row = row_of(plan.p.draft_logits, plan.draft_aligned, draft_row, plan.vocab_size);
  return make_task(plan, request, row, plan.p.draft_temperature[request]);
}

/// What stage kTarget knows of a slot from its first kernel on.
__device__ __forceinline__ Task task_of(const Plan& plan, Stage stage, int slot) {
  return stage == Stage::kTarget ? target_task(plan, slot, plan.request_of_row[slot]) : draft_task(plan, slot);
}

__device__ __forceinline__ NoiseKey noise_key(const Plan& plan, int request, int row, uint32_t stream) {
  return {static_cast<uint64_t>(plan.p.sampling.seed[request]), static_cast<uint32_t>(plan.p.positions[row]), stream};
}

/// Division by one number, rounded once as `/` is: the remainder of the first quotient is exact (P. Markstein,
/// "Computation of elementary functions on the IBM RISC System/6000 processor", 1990). Infinities give NaN.
struct Divisor {
  float value, reciprocal;

  __device__ float divide(float x) const {
    const float quotient = __fmul_rn(x, reciprocal);
    return __fmaf_rn(__fmaf_rn(-quotient, value, x), reciprocal, quotient);
  }
};

/// softmax(logits / temperature), cut and renormalised. Here z is computed, bit for bit as in the reference, for all
/// that compares it; NaN is no token.
struct Distribution {
  Divisor temperature;
  float peak;  // over the temperature
  float cutoff, log_mass;

  /// z = logit / temperature - peak, <= 0.
  __device__ float scaled(float logit) const { return __fsub_rn(temperature.divide(logit), peak); }
  /// -inf for excluded tokens.
  __device__ float log_probability(float logit) const {
    const float z = scaled(logit);
    return z >= cutoff ? __fsub_rn(z, log_mass) : kMinusInfinity;
  }
};

__device__ __forceinline__ Distribution make_distribution(float temperature, const Summary& s) {
  const Divisor divisor = {temperature, 1.0f / temperature};
  return {divisor, divisor.divide(s.peak), s.cutoff, s.log_mass};
}

/// Where only z is asked for.
__device__ __forceinline__ Distribution make_distribution(float temperature, float peak_logit) {
  return make_distribution(temperature, {peak_logit, kMinusInfinity, 0.0f, -1});
}

}  // namespace pearl::cuda

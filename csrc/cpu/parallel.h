// The kernels of a forward on the threads of a pool. What each thread computes is the same to the bit as on one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/thread_pool.h"
#include "pearl/params.h"

namespace pearl::parallel {

void rms_norm(ThreadPool& pool, const RmsNormParams& p);
void gated_activation(ThreadPool& pool, const GatedParams& p);
void scale_and_cap(ThreadPool& pool, const ScaleAndCapParams& p);
void rope_and_cache(ThreadPool& pool, const RopeAndCacheParams& p);
void verify_attention(ThreadPool& pool, const AttentionParams& p);
void gated_unit(ThreadPool& pool, const GatedUnitParams& p);
void combine(ThreadPool& pool, const CombineParams& p);

/// Memory in which each thread keeps its own copy of linear's x, because lines that two cores write and read travel
/// between them. Grows to the largest product.
class LinearScratch {
 public:
  explicit LinearScratch(const ThreadPool& pool) : copies_(static_cast<size_t>(pool.threads())) {}

 private:
  friend void linear(ThreadPool& pool, const LinearParams* products, int64_t count, LinearScratch& scratch);

  struct alignas(64) Copy {
    std::vector<float> rows;
    int64_t product = 0;  // whose x it is
  };
  std::vector<Copy> copies_;
  int64_t products_ = 0;
};

/// `count` products with equally many outputs, of rows that need not be equally many, as one stage: their panels lie in
/// a row. Scratch memory is set here.
void linear(ThreadPool& pool, const LinearParams* products, int64_t count, LinearScratch& scratch);

inline void linear(ThreadPool& pool, const LinearParams& p, LinearScratch& scratch) { linear(pool, &p, 1, scratch); }

}  // namespace pearl::parallel

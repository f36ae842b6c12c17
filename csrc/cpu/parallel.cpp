#include "cpu/parallel.h"

#include <algorithm>
#include <type_traits>

#include "cpu/dtype.h"
#include "cpu/kernel_table.h"

namespace pearl::parallel {
namespace {

/// Elements of a cheap stage that are worth another thread: a microsecond or two of work, several times a hand-over.
constexpr int64_t kCheapElements = 8192;
constexpr int64_t kExpCost = 4;  // an element with an exponential, in those without

/// Parts of an expensive stage for each thread. More parts even out threads that are late or slow.
constexpr int64_t kPiecesPerThread = 4;

int64_t cheap_pieces(const ThreadPool& pool, int64_t elements) {
  return std::min(pool.threads(), elements / kCheapElements);
}

int64_t pieces(const ThreadPool& pool) { return pool.threads() * kPiecesPerThread; }

template <class T>
T* offset(T* pointer, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return pointer == nullptr ? nullptr : static_cast<T*>(static_cast<Byte*>(pointer) + bytes);
}

}  // namespace

void rms_norm(ThreadPool& pool, const RmsNormParams& p) {
  pool.run(p.rows, cheap_pieces(pool, p.rows * p.width), [&](Range rows, int64_t) {
    const int64_t bytes = bytes_of(p.dtype);
    RmsNormParams part = p;
    part.rows = rows.end - rows.begin;
    part.x = offset(p.x, rows.begin * p.x_stride * bytes);
    part.residual = offset(p.residual, rows.begin * p.residual_stride * bytes);
    part.out = offset(p.out, rows.begin * p.width * bytes);
    kernels().rms_norm(part);
  });
}

void gated_activation(ThreadPool& pool, const GatedParams& p) {
  pool.run(p.rows, cheap_pieces(pool, p.rows * p.width * kExpCost), [&](Range rows, int64_t) {
    const int64_t bytes = bytes_of(p.dtype);
    GatedParams part = p;
    part.rows = rows.end - rows.begin;
    part.x = offset(p.x, rows.begin * p.x_stride * bytes);
    part.out = offset(p.out, rows.begin * p.width * bytes);
    kernels().gated_activation(part);
  });
}

void scale_and_cap(ThreadPool& pool, const ScaleAndCapParams& p) {
  pool.run(p.rows, cheap_pieces(pool, p.rows * p.width * (p.softcap > 0 ? kExpCost : 1)), [&](Range rows, int64_t) {
    ScaleAndCapParams part = p;
    part.rows = rows.end - rows.begin;
    part.x = offset(p.x, rows.begin * p.x_stride * bytes_of(p.dtype));
    kernels().scale_and_cap(part);
  });
}

void rope_and_cache(ThreadPool& pool, const RopeAndCacheParams& p) {
  const int64_t width = (p.query_heads + 2 * p.kv_heads) * p.head_dim;
  pool.run(p.tokens, cheap_pieces(pool, p.tokens * width), [&](Range tokens, int64_t) {
    const int64_t bytes = bytes_of(p.dtype);
    RopeAndCacheParams part = p;
    part.tokens = tokens.end - tokens.begin;
    part.q = offset(p.q, tokens.begin * p.q_stride * bytes);
    part.k = offset(p.k, tokens.begin * p.k_stride * bytes);
    part.v = offset(p.v, tokens.begin * p.v_stride * bytes);
    part.positions = p.positions + tokens.begin;
    part.slot_mapping = p.slot_mapping + tokens.begin;
    kernels().rope_and_cache(part);
  });
}

void verify_attention(ThreadPool& pool, const AttentionParams& p) {
  pool.run(attention_tasks(p), pieces(pool), [&](Range tasks, int64_t) { kernels().verify_attention(p, tasks); });
}

void gated_unit(ThreadPool& pool, const GatedUnitParams& p) {
  pool.run(p.rows, cheap_pieces(pool, p.rows * p.width * kExpCost), [&](Range rows, int64_t) {
    const int64_t bytes = bytes_of(p.dtype);
    GatedUnitParams part = p;
    part.rows = rows.end - rows.begin;
    part.x = offset(p.x, rows.begin * 2 * p.width * bytes);
    part.out = offset(p.out, rows.begin * p.width * bytes);
    kernels().gated_unit(part);
  });
}

void combine(ThreadPool& pool, const CombineParams& p) {
  pool.run(p.rows, cheap_pieces(pool, p.rows * p.width * p.top_k), [&](Range rows, int64_t) {
    const int64_t bytes = bytes_of(p.dtype);
    CombineParams part = p;
    part.rows = rows.end - rows.begin;
    part.places = p.places + rows.begin * p.top_k;
    part.weights = p.weights + rows.begin * p.top_k;
    part.shared = offset(p.shared, rows.begin * p.width * bytes);
    part.shared_gate = offset(p.shared_gate, rows.begin * bytes);
    part.out = offset(p.out, rows.begin * p.width * bytes);
    kernels().combine(part);
  });
}

void linear(ThreadPool& pool, const LinearParams* products, int64_t count, LinearScratch& scratch) {
  if (count == 0) return;
  const int64_t panels = linear_panels(products->out_features), first = scratch.products_ + 1;
  scratch.products_ += count;
  pool.run(count * panels, pieces(pool), [&](Range items, int64_t thread) {
    LinearScratch::Copy& copy = scratch.copies_[static_cast<size_t>(thread)];
    for (int64_t item = items.begin; item < items.end;) {
      const int64_t index = item / panels, begin = item % panels;
      const int64_t end = std::min(panels, begin + items.end - item);
      LinearParams own = products[index];
      const auto needed = static_cast<size_t>(linear_scratch_size(own));
      if (copy.rows.size() < needed) copy.rows.resize(needed);
      own.scratch = copy.rows.data();
      if (copy.product != first + index) kernels().linear_rows(own);
      copy.product = first + index;
      kernels().linear(own, {begin, end});
      item += end - begin;
    }
  });
}

}  // namespace pearl::parallel

#include "cpu/experts.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/dtype.h"

namespace pearl {
namespace {

uint8_t* rows_of(std::vector<uint8_t>& memory, int64_t bytes) {
  if (memory.size() < static_cast<size_t>(bytes)) memory.resize(static_cast<size_t>(bytes));
  return memory.data();
}

}  // namespace

void Experts::run(ThreadPool& pool, const ExpertLayer& layer, const ExpertsParams& p) {
  const int64_t bytes = bytes_of(p.dtype), meetings = p.rows * p.top_k;
  const int64_t width = layer.down.first.out_features, hidden = layer.down.first.in_features;
  group(layer.down.count, p);
  gather(width * bytes, p);
  uint8_t* gate_up = rows_of(gate_up_, meetings * 2 * hidden * bytes);
  uint8_t* activated = rows_of(activated_, meetings * hidden * bytes);
  uint8_t* made = rows_of(made_, meetings * width * bytes);
  multiply(pool, layer.gate_up, p.dtype, gathered_.data(), gate_up);
  parallel::gated_unit(pool, {p.dtype, meetings, hidden, gate_up, activated, layer.unit});
  multiply(pool, layer.down, p.dtype, activated, made);
  parallel::combine(pool,
                    {p.dtype, p.rows, width, p.top_k, made, places_.data(), p.weights, p.shared, p.shared_gate, p.out});
}

/// Counts each expert's rows and gives them their places.
void Experts::group(int64_t experts, const ExpertsParams& p) {
  const int64_t meetings = p.rows * p.top_k;
  starts_.assign(static_cast<size_t>(experts) + 1, 0);
  for (int64_t i = 0; i < meetings; ++i) {
    if (p.chosen[i] < 0 || p.chosen[i] >= experts) {
      throw std::invalid_argument("experts: an expert is " + std::to_string(p.chosen[i]) + ", must be in [0, " +
                                  std::to_string(experts) + ")");
    }
    ++starts_[p.chosen[i] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) starts_[e + 1] += starts_[e];
  places_.resize(static_cast<size_t>(meetings));
  for (int64_t i = 0; i < meetings; ++i) places_[i] = static_cast<int32_t>(starts_[p.chosen[i]]++);
  for (int64_t e = experts; e > 0; --e) starts_[e] = starts_[e - 1];  // each has moved to its end
  starts_[0] = 0;
}

void Experts::gather(int64_t row_bytes, const ExpertsParams& p) {
  uint8_t* gathered = rows_of(gathered_, p.rows * p.top_k * row_bytes);
  for (int64_t i = 0; i < p.rows * p.top_k; ++i) {
    const auto* row = static_cast<const uint8_t*>(p.x) + i / p.top_k * row_bytes;
    std::memcpy(gathered + places_[i] * row_bytes, row, static_cast<size_t>(row_bytes));
  }
}

/// Each expert's rows of x with its matrix, as one stage.
void Experts::multiply(ThreadPool& pool, const MatrixStack& matrices, DType dtype, const void* x, void* out) {
  const int64_t bytes = bytes_of(dtype), in = matrices.first.in_features * bytes;
  products_.clear();
  for (int64_t e = 0; e < matrices.count; ++e) {
    const int64_t begin = starts_[e], rows = starts_[e + 1] - begin;
    if (rows == 0) continue;
    products_.push_back(product(matrices.at(e), dtype, rows, static_cast<const uint8_t*>(x) + begin * in,
                                static_cast<uint8_t*>(out) + begin * matrices.first.out_features * bytes));
  }
  parallel::linear(pool, products_.data(), static_cast<int64_t>(products_.size()), scratch_);
}

}  // namespace pearl

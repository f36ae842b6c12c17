// The feed-forward experts of a layer on several threads: rows of one expert are multiplied together.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/packed_matrix.h"
#include "cpu/parallel.h"
#include "cpu/thread_pool.h"
#include "pearl/params.h"

namespace pearl {

struct ExpertLayer {
  MatrixStack gate_up;  // of [2 * hidden, width]
  MatrixStack down;     // of [width, hidden]
  GatedUnit unit;
};

/// As pearl_kernels.reference.experts.experts. D: down's outputs.
struct ExpertsParams {
  DType dtype;
  int64_t rows, top_k;
  const void* x;            // [rows, D]
  const int32_t* chosen;    // [rows, top_k], below the number of experts
  const float* weights;     // [rows, top_k]
  const void* shared;       // [rows, D] or null
  const void* shared_gate;  // [rows, 1]; null where shared is
  void* out;                // [rows, D]
};

/// Memory of one worker's forwards, kept from layer to layer. What a row becomes does not depend, to the bit, on the
/// rows beside it: products are `linear`'s, and its sum is in the order in which its experts were chosen.
class Experts {
 public:
  explicit Experts(const ThreadPool& pool) : scratch_(pool) {}

  /// Throws std::invalid_argument, before anything is written, if there is no such expert.
  void run(ThreadPool& pool, const ExpertLayer& layer, const ExpertsParams& p);

 private:
  void group(int64_t experts, const ExpertsParams& p);
  void gather(int64_t row_bytes, const ExpertsParams& p);
  void multiply(ThreadPool& pool, const MatrixStack& matrices, DType dtype, const void* x, void* out);

  std::vector<int64_t> starts_;  // [experts + 1]: rows of each expert, side by side
  std::vector<int32_t> places_;  // [rows, top_k]: where among them each row meets each of its experts
  std::vector<LinearParams> products_;
  std::vector<uint8_t> gathered_, gate_up_, activated_, made_;
  parallel::LinearScratch scratch_;
};

}  // namespace pearl

#include "cpu/tasks.h"

#include <algorithm>

namespace pearl {
namespace {

constexpr int64_t kMostStepInputs = 8;  // of WeightFormat

}  // namespace

int64_t linear_panels(int64_t out_features) { return (out_features + kPanelColumns - 1) / kPanelColumns; }

int64_t linear_groups(const LinearParams& p) { return p.group == 0 ? 0 : (p.in_features + p.group - 1) / p.group; }

int64_t linear_scratch_width(int64_t in_features) {
  return (in_features + kMostStepInputs - 1) / kMostStepInputs * kMostStepInputs;
}

int64_t linear_scratch_size(const LinearParams& p) {
  return p.rows * (linear_scratch_width(p.in_features) + (p.offset == nullptr ? 0 : linear_groups(p)));
}

int64_t attention_blocks(const AttentionParams& p) {
  int64_t rows = 0;
  for (int64_t r = 0; r < p.sequences; ++r) rows = std::max<int64_t>(rows, p.query_start[r + 1] - p.query_start[r]);
  return (rows * (p.query_heads / p.kv_heads) + kAttentionRows - 1) / kAttentionRows;
}

int64_t attention_tasks(const AttentionParams& p) { return p.sequences * p.kv_heads * attention_blocks(p); }

}  // namespace pearl

// How verify_attention is cut, for tests/emulated/test_cuda_attention_plan.py.
#include "cuda/attention_plan.cuh"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace pearl;

// found[9]: packed rows of a block, blocks, splits, groups, rows of partial results, their bytes, slots, counters,
// splits of a block.
EXPORT void run_cut(int dtype, int64_t sequences, int64_t tokens, int64_t query_heads, int64_t kv_heads,
                    int64_t head_dim, int64_t capacity, int64_t most_rows, int64_t* found) {
  AttentionParams p = {};
  p.q_dtype = p.cache_dtype = static_cast<DType>(dtype);
  p.sequences = sequences;
  p.tokens = tokens;
  p.query_heads = query_heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.page_size = 16;
  p.table_width = capacity / 16;
  p.most_rows = most_rows;
  const cuda::Cut cut = cuda::cut_attention(p);
  const int64_t all[9] = {cut.rows,    cut.blocks,     cut.splits, cut.groups(), cut.partial_rows, cut.partial_bytes(p),
                          cut.slots(), cut.counters(), cut.walk};
  std::copy(all, all + 9, found);
}

EXPORT int run_stages(int64_t other, int64_t stage, int resident, int block_shared, int multiprocessor_shared) {
  return cuda::ring_stages(other, stage, resident, {block_shared, multiprocessor_shared});
}

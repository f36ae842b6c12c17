#include "python/make_params.h"

namespace pearl {

LogitsArgument::LogitsArgument(Address data, int dtype, int64_t rows, int64_t stride)
    : LogitsView{pointer<const void>(data), static_cast<DType>(dtype), rows, stride} {}

SamplingArgument::SamplingArgument(Address temperature, Address top_k, Address top_p, Address min_p, Address seed)
    : SamplingView{pointer<const float>(temperature), pointer<const int32_t>(top_k), pointer<const float>(top_p),
                   pointer<const float>(min_p), pointer<const int64_t>(seed)} {}

RmsNormParams make_rms_norm(int dtype, int64_t rows, int64_t width, Address x, int64_t x_stride, Address residual,
                            int64_t residual_stride, Address weight, Address out, float eps) {
  RmsNormParams p = {};
  p.dtype = static_cast<DType>(dtype);
  p.rows = rows;
  p.width = width;
  p.x = pointer<const void>(x);
  p.x_stride = x_stride;
  p.residual = pointer<void>(residual);
  p.residual_stride = residual_stride;
  p.weight = pointer<const void>(weight);
  p.out = pointer<void>(out);
  p.eps = eps;
  return p;
}

GatedParams make_silu_and_mul(int dtype, int64_t rows, int64_t width, Address x, int64_t x_stride, Address out) {
  GatedParams p = {};
  p.dtype = static_cast<DType>(dtype);
  p.rows = rows;
  p.width = width;
  p.x = pointer<const void>(x);
  p.x_stride = x_stride;
  p.out = pointer<void>(out);
  return p;
}

GatedParams make_gelu_and_mul(int dtype, int64_t rows, int64_t width, Address x, int64_t x_stride, Address out) {
  GatedParams p = make_silu_and_mul(dtype, rows, width, x, x_stride, out);
  p.activation = Activation::kGeluTanh;
  return p;
}

ScaleAndCapParams make_scale_and_cap(int dtype, int64_t rows, int64_t width, Address x, int64_t x_stride, float scale,
                                     float softcap) {
  return {static_cast<DType>(dtype), rows, width, pointer<void>(x), x_stride, scale, softcap};
}

RopeAndCacheParams make_rope_and_cache(int dtype, int64_t tokens, int64_t query_heads, int64_t kv_heads,
                                       int64_t head_dim, Address q, int64_t q_stride, Address k, int64_t k_stride,
                                       Address v, int64_t v_stride, Address positions, Address cos_sin,
                                       int64_t max_position, Address k_cache, Address v_cache, int64_t slots,
                                       Address slot_mapping, Address q_norm, Address k_norm, float eps) {
  RopeAndCacheParams p = {};
  p.dtype = static_cast<DType>(dtype);
  p.tokens = tokens;
  p.query_heads = query_heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.q = pointer<void>(q);
  p.q_stride = q_stride;
  p.k = pointer<const void>(k);
  p.k_stride = k_stride;
  p.v = pointer<const void>(v);
  p.v_stride = v_stride;
  p.positions = pointer<const int64_t>(positions);
  p.cos_sin = pointer<const float>(cos_sin);
  p.max_position = max_position;
  p.k_cache = pointer<void>(k_cache);
  p.v_cache = pointer<void>(v_cache);
  p.slots = slots;
  p.slot_mapping = pointer<const int64_t>(slot_mapping);
  p.q_norm = pointer<const void>(q_norm);
  p.k_norm = pointer<const void>(k_norm);
  p.eps = eps;
  return p;
}

AttentionParams make_verify_attention(int q_dtype, int cache_dtype, int64_t sequences, int64_t tokens,
                                      int64_t query_heads, int64_t kv_heads, int64_t head_dim, int64_t pages,
                                      int64_t page_size, Address q, int64_t q_stride, Address k_cache, Address v_cache,
                                      Address block_tables, int64_t table_width, int64_t table_stride,
                                      Address query_start, Address context_lens, Address out, float scale,
                                      int64_t window, float softcap, Address sinks, int64_t most_rows, Address counters,
                                      int64_t counter_count) {
  AttentionParams p = {};
  p.q_dtype = static_cast<DType>(q_dtype);
  p.cache_dtype = static_cast<DType>(cache_dtype);
  p.sequences = sequences;
  p.tokens = tokens;
  p.query_heads = query_heads;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.pages = pages;
  p.page_size = page_size;
  p.q = pointer<const void>(q);
  p.q_stride = q_stride;
  p.k_cache = pointer<const void>(k_cache);
  p.v_cache = pointer<const void>(v_cache);
  p.block_tables = pointer<const int32_t>(block_tables);
  p.table_width = table_width;
  p.table_stride = table_stride;
  p.query_start = pointer<const int32_t>(query_start);
  p.context_lens = pointer<const int32_t>(context_lens);
  p.out = pointer<void>(out);
  p.scale = scale;
  p.window = window;
  p.softcap = softcap;
  p.sinks = pointer<const float>(sinks);
  p.most_rows = most_rows;
  p.counters = pointer<uint32_t>(counters);
  p.counter_count = counter_count;
  return p;
}

VerifyParams make_verify(const LogitsArgument& logits, const SamplingArgument& sampling, Address draft_tokens,
                         Address row_start, Address positions, int64_t requests, int64_t vocab_size, int rule,
                         Address draft_logprobs, const LogitsArgument& draft_logits, Address draft_rows,
                         Address draft_temperature, Address accepted, Address next_token) {
  VerifyParams p = {};
  p.logits = logits;
  p.sampling = sampling;
  p.draft_tokens = pointer<const int64_t>(draft_tokens);
  p.row_start = pointer<const int32_t>(row_start);
  p.positions = pointer<const int64_t>(positions);
  p.requests = requests;
  p.vocab_size = vocab_size;
  p.rule = static_cast<Rule>(rule);
  p.draft_logprobs = pointer<const float>(draft_logprobs);
  p.draft_logits = draft_logits;
  p.draft_rows = pointer<const int32_t>(draft_rows);
  p.draft_temperature = pointer<const float>(draft_temperature);
  p.accepted = pointer<int32_t>(accepted);
  p.next_token = pointer<int64_t>(next_token);
  return p;
}

CopyBlocksParams make_copy_blocks(Address cache, int64_t pages, int64_t page_bytes, Address pairs, int64_t count) {
  return {pointer<void>(cache), pages, page_bytes, pointer<const int64_t>(pairs), count};
}

}  // namespace pearl

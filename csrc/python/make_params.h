// Parameters of the operators that both native modules have, from what pearl_kernels.native passes after its checks:
// pointers as integers (0: none), sizes and strides in elements, positional.
#pragma once

#include <cstdint>

#include "pearl/params.h"
#include "python/arguments.h"

namespace pearl {

/// A matrix of logits as Python hands it over: (address, dtype, rows, stride).
struct LogitsArgument : LogitsView {
  LogitsArgument(Address data, int dtype, int64_t rows, int64_t stride);
};

/// Sampling parameters as Python hands them over: five addresses.
struct SamplingArgument : SamplingView {
  SamplingArgument(Address temperature, Address top_k, Address top_p, Address min_p, Address seed);
};

RmsNormParams make_rms_norm(int dtype, int64_t rows, int64_t width, Address x, int64_t x_stride, Address residual,
                            int64_t residual_stride, Address weight, Address out, float eps);

GatedParams make_silu_and_mul(int dtype, int64_t rows, int64_t width, Address x, int64_t x_stride, Address out);
GatedParams make_gelu_and_mul(int dtype, int64_t rows, int64_t width, Address x, int64_t x_stride, Address out);

ScaleAndCapParams make_scale_and_cap(int dtype, int64_t rows, int64_t width, Address x, int64_t x_stride, float scale,
                                     float softcap);

RopeAndCacheParams make_rope_and_cache(int dtype, int64_t tokens, int64_t query_heads, int64_t kv_heads,
                                       int64_t head_dim, Address q, int64_t q_stride, Address k, int64_t k_stride,
                                       Address v, int64_t v_stride, Address positions, Address cos_sin,
                                       int64_t max_position, Address k_cache, Address v_cache, int64_t slots,
                                       Address slot_mapping, Address q_norm, Address k_norm, float eps);

/// Without a workspace, like make_verify.
AttentionParams make_verify_attention(int q_dtype, int cache_dtype, int64_t sequences, int64_t tokens,
                                      int64_t query_heads, int64_t kv_heads, int64_t head_dim, int64_t pages,
                                      int64_t page_size, Address q, int64_t q_stride, Address k_cache, Address v_cache,
                                      Address block_tables, int64_t table_width, int64_t table_stride,
                                      Address query_start, Address context_lens, Address out, float scale,
                                      int64_t window, float softcap, Address sinks, int64_t most_rows, Address counters,
                                      int64_t counter_count);

VerifyParams make_verify(const LogitsArgument& logits, const SamplingArgument& sampling, Address draft_tokens,
                         Address row_start, Address positions, int64_t requests, int64_t vocab_size, int rule,
                         Address draft_logprobs, const LogitsArgument& draft_logits, Address draft_rows,
                         Address draft_temperature, Address accepted, Address next_token);

CopyBlocksParams make_copy_blocks(Address cache, int64_t pages, int64_t page_bytes, Address pairs, int64_t count);

}  // namespace pearl

// What a kernel is told: plain structs of pointers and sizes, the same for every instruction set.
//
// Shapes stand beside each pointer. A stride counts elements between two rows; where none is given the tensor is
// contiguous. N tokens, R requests or sequences, D head width, S slots of a page, P pages.
#pragma once

#include <cstdint>

namespace pearl {

/// The CPU kernels take the first two, the GPU's all.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

/// The upper half of an fp32.
struct BFloat16 {
  uint16_t bits;
};

/// Scratch memory of a GPU kernel, uninitialised; the CPU's need none.
struct Workspace {
  void* data;
  int64_t bytes;
};

struct RmsNormParams {
  DType dtype;  // of every tensor here
  int64_t rows, width;
  const void* x;  // [rows, width]
  int64_t x_stride;
  void* residual;  // [rows, width], becomes residual + x, which is what is normed; null: x is normed
  int64_t residual_stride;
  const void* weight;  // [width]; CPU: null with a residual: the sum is all, and out is not written
  void* out;           // [rows, width]
  float eps;
};

enum class Activation : int32_t { kSilu = 0, kGeluTanh = 1 };

struct GatedParams {
  DType dtype;
  Activation activation;
  int64_t rows, width;
  const void* x;  // [rows, 2 * width]: gates, then ups
  int64_t x_stride;
  void* out;  // [rows, width]
};

struct ScaleAndCapParams {
  DType dtype;
  int64_t rows, width;
  void* x;  // [rows, width], in place
  int64_t x_stride;
  float scale;
  float softcap;  // 0: none
};

/// Items [begin, end) of something that can be divided among threads.
struct Range {
  int64_t begin, end;
};

/// Output columns of a panel of LinearParams::weight: three vectors, so that eight rows fill AVX-512's registers.
inline constexpr int64_t kPanelColumns = 48;

/// What LinearParams::weight holds. Columns at or past out_features and inputs at or past in_features are zero.
enum class WeightFormat : int32_t {
  kFull = 0,  // [panels, steps, kPanelColumns, e] of dtype: e inputs (bf16: 2, fp32: 1) of a column are one step
  kInt8 = 1,  // [panels, steps, 2, kPanelColumns]: two inputs are one step, with `scale`
  // With `scale` and `offset` for each group of inputs.
  kGroupInt4 = 2,  // [panels, steps, kPanelColumns] words of eight inputs, four bits each, two's complement: from the
                   // lowest bits on inputs 0, 2, 4, 6 in the lower half, 1, 3, 5, 7 in the upper
  kGroupInt8 = 3,  // as kInt8
};

struct LinearParams {
  DType dtype;  // of x, bias and out
  WeightFormat format;
  int64_t rows, in_features, out_features;
  const void* x;  // [rows, in_features]
  int64_t x_stride;
  const void* weight;
  const float* scale;   // kInt8: [out_features]; of groups: [panels, groups, kPanelColumns]; else null
  const float* offset;  // of groups: as scale, to be added to a weight, or null
  int64_t group;        // of groups: inputs in one, whole steps (the last may have fewer), else 0
  const void* bias;     // [out_features] or null
  void* out;            // [rows, out_features]
  float* scratch;       // CPU: linear_scratch_size
};

struct RouteParams {
  DType dtype;  // of logits
  int64_t rows, experts, top_k;
  const void* logits;  // [rows, experts]
  int64_t logits_stride;
  bool renormalise;
  int32_t* chosen;  // [rows, top_k]
  float* weights;   // [rows, top_k]
};

/// g * sigmoid(gain * g) * (u + offset) with g up to limit and u from -limit to limit; gain > 0.
struct GatedUnit {
  float gain, limit, offset;
};

struct GatedUnitParams {
  DType dtype;
  int64_t rows, width;
  const void* x;  // [rows, 2 * width]: gates, then ups
  void* out;      // [rows, width]
  GatedUnit unit;
};

/// The weighted sums of what experts have made, and of a part that all rows have.
struct CombineParams {
  DType dtype;  // of made, shared, shared_gate and out
  int64_t rows, width, top_k;
  const void* made;         // [rows * top_k, width]
  const int32_t* places;    // [rows, top_k]: rows of made
  const float* weights;     // [rows, top_k]
  const void* shared;       // [rows, width] or null: begins the sum, times sigmoid(shared_gate)
  const void* shared_gate;  // [rows]; null where shared is
  void* out;                // [rows, width]
};

struct RopeAndCacheParams {
  DType dtype;  // of q, k, v, the caches and the norm weights
  int64_t tokens, query_heads, kv_heads, head_dim;
  void* q;  // [N, query_heads, D], rotated in place
  int64_t q_stride;
  const void* k;  // [N, kv_heads, D]
  int64_t k_stride;
  const void* v;  // [N, kv_heads, D]
  int64_t v_stride;
  const int64_t* positions;  // [N], in [0, max_position)
  const float* cos_sin;      // [max_position, D]: D / 2 cosines, then D / 2 sines
  int64_t max_position;
  void* k_cache;  // [slots, kv_heads, D], slots = P * S
  void* v_cache;
  int64_t slots;
  const int64_t* slot_mapping;  // [N], below slots; negative: nothing is written
  const void* q_norm;           // [D] or null
  const void* k_norm;           // [D] or null
  float eps;
};

struct AttentionParams {
  DType q_dtype;      // of q and out
  DType cache_dtype;  // of both caches
  int64_t sequences, tokens, query_heads, kv_heads, head_dim, pages, page_size;
  const void* q;  // [N, query_heads, D]
  int64_t q_stride;
  const void* k_cache;  // [P, S, kv_heads, D]
  const void* v_cache;
  const int32_t* block_tables;  // [R, table_width]
  int64_t table_width, table_stride;
  const int32_t* query_start;   // [R + 1]
  const int32_t* context_lens;  // [R]
  void* out;                    // [N, query_heads, D]
  float scale;
  int64_t window;      // keys a row sees, its own included; 0: all
  float softcap;       // 0: none
  const float* sinks;  // [query_heads]: a key's score without its value, neither scaled nor capped; null: none
  int64_t most_rows;   // of one sequence, as far as the caller knows; 0: unknown. A hint: no result depends on it
  uint32_t* counters;  // GPU: zero, and zero again afterwards, used by no other kernel meanwhile; null: none
  int64_t counter_count;
  Workspace workspace;
};

/// Rows of logits. Columns at or past the vocabulary's size are padding and never read.
struct LogitsView {
  const void* data;  // [rows, >= vocab_size]
  DType dtype;
  int64_t rows, stride;
};

/// One entry a row (sample) or a request (verify).
struct SamplingView {
  const float* temperature;  // 0: greedy
  const int32_t* top_k;      // 0: off
  const float* top_p;        // 1: off
  const float* min_p;        // 0: off
  const int64_t* seed;
};

inline constexpr int64_t kMostAlternatives = 8;

/// Where alternatives to drawn tokens go, as pearl_kernels/reference/sampling.py describes them.
struct AlternativesView {
  int64_t count;    // of each token, up to kMostAlternatives; 0: none are asked for
  int64_t* tokens;  // [N, count], best first; -1: no more
  float* scores;    // [N, count]
  float* drawn;     // [N], the drawn tokens' scores
};

struct SampleParams {
  LogitsView logits;
  SamplingView sampling;     // [N]
  const int64_t* positions;  // [N]
  int64_t vocab_size;
  uint32_t stream;
  int64_t* tokens;  // [N]
  float* logprobs;  // [N]
  AlternativesView alternatives;
};

enum class Rule : int32_t { kRejection = 0, kCoupled = 1, kBlock = 2 };  // the GPU kernels have the first two

struct VerifyParams {
  LogitsView logits;  // N rows
  SamplingView sampling;
  const int64_t* draft_tokens;  // [N], -1: bonus row
  const int32_t* row_start;     // [R + 1]
  const int64_t* positions;     // [N]
  int64_t requests, vocab_size;
  Rule rule;
  const float* draft_logprobs;     // [N]; like all that follow, null under kCoupled
  LogitsView draft_logits;         // Q rows; data is null where no token needs one
  const int32_t* draft_rows;       // [N], row of draft_logits; -1: q is the point mass on the token
  const float* draft_temperature;  // [R]; null where draft_logits is
  int32_t* accepted;               // [R]
  int64_t* next_token;             // [R], -1: none
  Workspace workspace;
};

struct CopyBlocksParams {
  void* cache;  // [P, ...]
  int64_t pages, page_bytes;
  const int64_t* pairs;  // [count, 2]: source page, destination page
  int64_t count;
};

/// Random numbers by themselves, for tests: one row of noise for each (seed, position).
struct NoiseParams {
  const int64_t* seed;      // [N]
  const int64_t* position;  // [N]
  uint32_t stream;
  int64_t rows, vocab_size;
  float* out;  // [N, vocab_size]
};

}  // namespace pearl

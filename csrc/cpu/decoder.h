// A whole decoder forward in one call: the kernels in the order of pearl/models/decoder.py, without Python between
// them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/experts.h"
#include "cpu/packed_matrix.h"
#include "cpu/parallel.h"
#include "cpu/thread_pool.h"
#include "pearl/params.h"

namespace pearl {

/// What is the same in every layer. All tensors, weights and KV are of one dtype.
struct DecoderShape {
  DType dtype;
  int64_t hidden, query_heads, kv_heads, head_dim, ffn, vocab_size, max_position, pages, page_size;
  float residual_eps, eps;  // of norms of the residual, and of all others
  float scale, softcap;     // of attention scores; softcap 0: none
  bool norms_projections;   // q_norm and k_norm are over all heads of a token together
  Activation activation;
  // See ScaleAndCapParams; scales of 1 and a cap of 0: nothing is done.
  float embedding_scale, logits_scale, logits_softcap;
  float residual_multiplier;  // of what the caller calls hidden states, over the residual as it is here
};

/// A layer that is a mixture of experts. Its gate_up and down, where they are not null, are of an expert that all
/// tokens meet.
struct DecoderMixture {
  PackedMatrix router;  // [experts, hidden]
  ExpertLayer experts;
  PackedMatrix shared_gate;  // [1, hidden]; its weight is null where there is no shared expert
  int64_t top_k;
  bool renormalise;
};

/// A norm's weight may be null: there is none.
struct DecoderLayer {
  const void* input_norm;  // [hidden]
  PackedMatrix qkv;        // [(query_heads + 2 * kv_heads) * head_dim, hidden]
  const void* q_norm;      // [head_dim]; of a shape that norms projections [query_heads * head_dim]
  const void* k_norm;
  PackedMatrix output;              // [hidden, query_heads * head_dim]
  const void* attention_post_norm;  // [hidden], of what the attention adds to the residual
  const void* mlp_norm;             // [hidden]
  PackedMatrix gate_up;             // [2 * ffn, hidden]
  PackedMatrix down;                // [hidden, ffn]
  const void* mlp_post_norm;        // [hidden]
  const float* cos_sin;             // [max_position, head_dim]
  void* k_cache;                    // [pages, page_size, kv_heads, head_dim]
  void* v_cache;
  int64_t window;      // 0: all keys
  const float* sinks;  // [query_heads], of the attention's softmax; null: none
  std::optional<DecoderMixture> mixture;
};

/// What a decoder reads beside tokens if it is a head that drafts from a target's states (pearl/heads/eagle.py): a
/// feature of each. The first layer's qkv is of both, normed, side by side: [.., 2 * hidden].
struct FeatureInput {
  const void* token_norm;     // [hidden], of the embedding
  const void* feature_norm;   // [hidden]
  bool norm_before_residual;  // the residual begins with the normed feature, else with the feature
};

/// Where the embeddings are.
struct Embedding {
  const void* table;    // [vocab_size, hidden]; null: they are the rows of `packed`, which is kFull then
  PackedMatrix packed;  // [vocab_size, hidden]
};

/// The last layer's outputs, normed, to logits.
struct DecoderHead {
  const void* norm;     // [hidden]
  PackedMatrix matrix;  // [vocab_size, hidden], or with ids as many rows as these
  const int64_t* ids;   // the column of each row's logits, below vocab_size; all others are -inf. Null: its own
};

/// What a forward leaves of itself beside its logits, as in pearl/models/hidden_states.py.
struct HiddenView {
  const int64_t* layers;  // [count], rising, from 0 to the number of layers: that is the final norm's output
  int64_t count;
  void* rows;  // [N, count, hidden]
};

/// One forward's input, as in pearl/models/forward_batch.py.
struct DecoderBatch {
  int64_t tokens, sequences, table_width, num_logits;
  const int64_t* input_ids;     // [N], below vocab_size
  const int64_t* positions;     // [N], below max_position
  const int64_t* slot_mapping;  // [N]
  const int32_t* block_tables;  // [R, table_width]
  const int32_t* query_start;   // [R + 1]
  const int32_t* context_lens;  // [R]
  const int64_t* logits_rows;   // [num_logits], below N
  void* logits;                 // [num_logits, vocab_size]
  HiddenView hidden = {};
  const void* features = nullptr;  // [N, hidden], of a decoder that reads them
  void* outputs = nullptr;         // [N, hidden]: of the last layer, before the final norm; null: they are not wanted
};

/// Belongs to one thread, which its pool's helpers help: as many as make `threads` with it, or `beside` while cores are
/// shared. The tensors behind the pointers must outlive it.
class Decoder {
 public:
  Decoder(const DecoderShape& shape, std::vector<DecoderLayer> layers, const Embedding& embedding,
          const DecoderHead& head, int64_t threads, int64_t beside,
          std::optional<FeatureInput> features = std::nullopt);

  /// Throws std::invalid_argument, before anything is written, if an index of the batch is out of range.
  void forward(const DecoderBatch& batch);

  /// Whether forwards from now on run beside another model's, which wants cores too.
  void share_cores(bool shared) { cores_shared_ = shared; }

  /// Of all layers' keys and values: `pairs` [count, 2] of source and destination, below shape().pages, in any order.
  void copy_pages(const int64_t* pairs, int64_t count);

  const DecoderShape& shape() const { return shape_; }
  bool reads_features() const { return features_.has_value(); }

 private:
  void count_weights(const PackedMatrix& matrix);
  void reserve(int64_t tokens);
  void check(const DecoderBatch& batch);
  void embed(const DecoderBatch& batch);
  const void* pair(const DecoderBatch& batch);
  void attend(const DecoderLayer& layer, const DecoderBatch& batch, const void* x);
  void norm_projections(const DecoderLayer& layer, int64_t tokens);
  void feed_forward(const DecoderLayer& layer, int64_t tokens, const void* x);
  void dense(const DecoderLayer& layer, int64_t tokens, const void* x, void* out);
  void mix(const DecoderLayer& layer, int64_t tokens, const void* x);
  const void* enter(const void* norm, bool add, int64_t tokens);
  void leave(const void* norm, int64_t tokens);
  void project(const PackedMatrix& matrix, const void* x, void* out, int64_t tokens);
  void write_logits(const DecoderBatch& batch);
  void project_head(const DecoderBatch& batch);
  bool keeps(int64_t layer, const DecoderBatch& batch) const;
  void keep(int64_t layer, const uint8_t* states, float scale, const DecoderBatch& batch) const;

  void* at(void* rows, int64_t row, int64_t width) const;
  RopeAndCacheParams rope_params(const DecoderLayer& layer, const DecoderBatch& batch);
  AttentionParams attention_params(const DecoderLayer& layer, const DecoderBatch& batch);

  DecoderShape shape_;
  std::vector<DecoderLayer> layers_;
  Embedding embedding_;
  DecoderHead head_;
  std::optional<FeatureInput> features_;

  // Activations, as many rows as the largest batch so far.
  int64_t capacity_ = 0;
  std::vector<uint8_t> residual_, normed_, sublayer_, qkv_, attended_, gate_up_, activated_;
  std::vector<uint8_t> normed_q_, normed_k_;  // of a shape that norms projections
  std::vector<uint8_t> pair_, own_logits_;    // of one that reads features; of a head with ids

  int64_t most_experts_ = 0, most_top_k_ = 0, ffn_ = 0;  // of any layer
  std::vector<uint8_t> router_logits_, shared_, shared_gate_;
  std::vector<int32_t> chosen_;
  std::vector<float> expert_weights_;

  ThreadPool pool_, alone_{1};
  std::optional<ThreadPool> beside_;  // where it has fewer threads than the pool
  bool cores_shared_ = false;
  ThreadPool* threads_ = &pool_;  // of this forward
  parallel::LinearScratch scratch_;
  Experts experts_;
  int64_t weight_bytes_ = 0;
};

}  // namespace pearl

#include "cpu/decoder.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/checks.h"
#include "cpu/copy_blocks.h"
#include "cpu/dtype.h"
#include "cpu/routing.h"

namespace pearl {
namespace {

/// Bytes of weights for which waking the helpers pays, where few rows pass over them: they take one core several times
/// the tens of microseconds until a helper has woken.
constexpr int64_t kWorthHelpers = 8 << 20;
constexpr int64_t kFewRows = 4;  // cost about what one row costs; more cost time in proportion

void check_rows(const char* name, const int64_t* values, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < 0 || values[i] >= limit) {
      throw std::invalid_argument(std::string("decoder: ") + name + " holds " + std::to_string(values[i]) +
                                  ", must be in [0, " + std::to_string(limit) + ")");
    }
  }
}

int64_t weight_bits(WeightFormat format, DType dtype) {
  switch (format) {
    case WeightFormat::kFull:
      return 8 * bytes_of(dtype);
    case WeightFormat::kInt8:
    case WeightFormat::kGroupInt8:
      return 8;
    case WeightFormat::kGroupInt4:
      return 4;
  }
  return 0;
}

/// Row `row`, of `bytes`, of a matrix in WeightFormat::kFull: the inputs of a step are 4 bytes of each column.
void read_packed_row(const void* packed, int64_t row, int64_t bytes, uint8_t* out) {
  constexpr int64_t kStep = 4, kStride = kStep * kPanelColumns;
  const int64_t panel_bytes = (bytes + kStep - 1) / kStep * kStride;
  const auto* in =
      static_cast<const uint8_t*>(packed) + row / kPanelColumns * panel_bytes + row % kPanelColumns * kStep;
  for (int64_t done = 0; done < bytes; done += kStep, in += kStride) {
    std::memcpy(out + done, in, static_cast<size_t>(std::min(kStep, bytes - done)));
  }
}

}  // namespace

Decoder::Decoder(const DecoderShape& shape, std::vector<DecoderLayer> layers, const Embedding& embedding,
                 const DecoderHead& head, int64_t threads, int64_t beside, std::optional<FeatureInput> features)
    : shape_(shape),
      layers_(std::move(layers)),
      embedding_(embedding),
      head_(head),
      features_(features),
      pool_(threads),
      scratch_(pool_),
      experts_(pool_) {
  if (beside > threads) throw std::invalid_argument("decoder: more threads beside another model than alone");
  if (beside < threads) beside_.emplace(beside);
  if (layers_.empty()) throw std::invalid_argument("decoder: a model needs at least one layer");
  for (const DecoderLayer& layer : layers_) {
    for (const PackedMatrix* matrix : {&layer.qkv, &layer.output, &layer.gate_up, &layer.down}) count_weights(*matrix);
    ffn_ = std::max(ffn_, layer.down.in_features);
    if (!layer.mixture) continue;
    const DecoderMixture& mixture = *layer.mixture;
    for (int64_t i = 0; i < mixture.top_k; ++i) {  // what one row reads
      count_weights(mixture.experts.gate_up.first);
      count_weights(mixture.experts.down.first);
    }
    most_experts_ = std::max(most_experts_, mixture.experts.gate_up.count);
    most_top_k_ = std::max(most_top_k_, mixture.top_k);
  }
  count_weights(head_.matrix);
  if (embedding_.table == nullptr && embedding_.packed.format != WeightFormat::kFull) {
    throw std::invalid_argument("decoder: a head of integers cannot be read as the embedding");
  }
  if (head_.ids != nullptr) check_rows("ids of the head", head_.ids, head_.matrix.out_features, shape_.vocab_size);
}

void Decoder::count_weights(const PackedMatrix& matrix) {
  weight_bytes_ += matrix.in_features * matrix.out_features * weight_bits(matrix.format, shape_.dtype) / 8;
}

void Decoder::forward(const DecoderBatch& batch) {
  reserve(batch.tokens);
  check(batch);
  const bool long_enough = weight_bytes_ * std::max<int64_t>(1, batch.tokens / kFewRows) >= kWorthHelpers;
  threads_ = !long_enough ? &alone_ : cores_shared_ && beside_ ? &*beside_ : &pool_;
  embed(batch);
  for (const DecoderLayer& layer : layers_) {
    const bool first = &layer == layers_.data();
    const void* entered = first && features_ ? pair(batch) : enter(layer.input_norm, !first, batch.tokens);
    keep(&layer - layers_.data(), residual_.data(), shape_.residual_multiplier, batch);
    attend(layer, batch, entered);
    leave(layer.attention_post_norm, batch.tokens);
    feed_forward(layer, batch.tokens, enter(layer.mlp_norm, true, batch.tokens));
    leave(layer.mlp_post_norm, batch.tokens);
  }
  write_logits(batch);
}

void Decoder::check(const DecoderBatch& batch) {
  check_rows("input_ids", batch.input_ids, batch.tokens, shape_.vocab_size);
  check_rows("logits_rows", batch.logits_rows, batch.num_logits, batch.tokens);
  check_rows("hidden layers", batch.hidden.layers, batch.hidden.count, static_cast<int64_t>(layers_.size()) + 1);
  if (batch.tokens > 0 && (batch.features != nullptr) != features_.has_value()) {
    throw std::invalid_argument(features_ ? "decoder: a head needs a feature for each token"
                                          : "decoder: features are for heads");
  }
  pearl::check(rope_params(layers_[0], batch));
  pearl::check(attention_params(layers_[0], batch));
}

void Decoder::reserve(int64_t tokens) {
  if (tokens <= capacity_) return;
  const DecoderShape& s = shape_;
  const int64_t bytes = tokens * bytes_of(s.dtype);
  const int64_t query_width = s.query_heads * s.head_dim, kv_width = s.kv_heads * s.head_dim;
  residual_.resize(bytes * s.hidden);
  normed_.resize(bytes * s.hidden);
  sublayer_.resize(bytes * s.hidden);
  qkv_.resize(bytes * (query_width + 2 * kv_width));
  attended_.resize(bytes * query_width);
  gate_up_.resize(bytes * 2 * ffn_);
  activated_.resize(bytes * ffn_);
  if (most_experts_ > 0) {
    router_logits_.resize(bytes * most_experts_);
    shared_.resize(bytes * s.hidden);
    shared_gate_.resize(bytes);
    chosen_.resize(tokens * most_top_k_);
    expert_weights_.resize(tokens * most_top_k_);
  }
  if (s.norms_projections) {
    normed_q_.resize(bytes * query_width);
    normed_k_.resize(bytes * kv_width);
  }
  if (features_) pair_.resize(bytes * 2 * s.hidden);
  capacity_ = tokens;
}

void* Decoder::at(void* rows, int64_t row, int64_t width) const {
  return static_cast<uint8_t*>(rows) + row * width * bytes_of(shape_.dtype);
}

void Decoder::copy_pages(const int64_t* pairs, int64_t count) {
  if (count == 0) return;
  const int64_t bytes = shape_.page_size * shape_.kv_heads * shape_.head_dim * bytes_of(shape_.dtype);
  for (const DecoderLayer& layer : layers_) {
    for (void* cache : {layer.k_cache, layer.v_cache}) copy_blocks({cache, shape_.pages, bytes, pairs, count});
  }
}

/// The first residual: the tokens' embeddings.
void Decoder::embed(const DecoderBatch& batch) {
  const int64_t bytes = shape_.hidden * bytes_of(shape_.dtype);
  const auto* table = static_cast<const uint8_t*>(embedding_.table);
  for (int64_t i = 0; i < batch.tokens; ++i) {
    uint8_t* out = residual_.data() + i * bytes;
    if (table == nullptr) {
      read_packed_row(embedding_.packed.weight, batch.input_ids[i], bytes, out);
    } else {
      std::memcpy(out, table + batch.input_ids[i] * bytes, bytes);
    }
  }
  if (shape_.embedding_scale != 1.0f) {
    parallel::scale_and_cap(*threads_, {shape_.dtype, batch.tokens, shape_.hidden, residual_.data(), shape_.hidden,
                                        shape_.embedding_scale, 0.0f});
  }
}

/// What the first layer of a head reads, of tokens that are embedded; then the residual is what their features begin it
/// with.
const void* Decoder::pair(const DecoderBatch& batch) {
  const int64_t bytes = shape_.hidden * bytes_of(shape_.dtype);
  const void* sources[] = {residual_.data(), batch.features};
  const void* norms[] = {features_->token_norm, features_->feature_norm};
  for (int64_t half = 0; half < 2; ++half) {
    parallel::rms_norm(*threads_, {shape_.dtype, batch.tokens, shape_.hidden, sources[half], shape_.hidden, nullptr, 0,
                                   norms[half], normed_.data(), shape_.residual_eps});
    for (int64_t i = 0; i < batch.tokens; ++i) {
      std::memcpy(pair_.data() + (2 * i + half) * bytes, normed_.data() + i * bytes, static_cast<size_t>(bytes));
    }
  }
  const void* begin = features_->norm_before_residual ? normed_.data() : batch.features;
  std::memcpy(residual_.data(), begin, static_cast<size_t>(batch.tokens * bytes));
  return pair_.data();
}

/// What the next sublayer reads: the residual, normed where there is a norm. With `add` the last sublayer's output
/// joins the residual first.
const void* Decoder::enter(const void* norm, bool add, int64_t tokens) {
  void* residual = residual_.data();
  if (norm == nullptr && !add) return residual;
  const void* x = add ? sublayer_.data() : residual;
  parallel::rms_norm(*threads_, {shape_.dtype, tokens, shape_.hidden, x, shape_.hidden, add ? residual : nullptr,
                                 shape_.hidden, norm, normed_.data(), shape_.residual_eps});
  return norm == nullptr ? residual : normed_.data();
}

/// What a sublayer adds to the residual is normed first, where there is a norm.
void Decoder::leave(const void* norm, int64_t tokens) {
  if (norm == nullptr) return;
  void* x = sublayer_.data();
  parallel::rms_norm(*threads_,
                     {shape_.dtype, tokens, shape_.hidden, x, shape_.hidden, nullptr, 0, norm, x, shape_.eps});
}

void Decoder::project(const PackedMatrix& matrix, const void* x, void* out, int64_t tokens) {
  parallel::linear(*threads_, product(matrix, shape_.dtype, tokens, x, out), scratch_);
}

void Decoder::attend(const DecoderLayer& layer, const DecoderBatch& batch, const void* x) {
  project(layer.qkv, x, qkv_.data(), batch.tokens);
  if (shape_.norms_projections) norm_projections(layer, batch.tokens);
  parallel::rope_and_cache(*threads_, rope_params(layer, batch));
  parallel::verify_attention(*threads_, attention_params(layer, batch));
  project(layer.output, attended_.data(), sublayer_.data(), batch.tokens);
}

/// Queries and keys, each over all its heads, out of the merged projection.
void Decoder::norm_projections(const DecoderLayer& layer, int64_t tokens) {
  const int64_t query_width = shape_.query_heads * shape_.head_dim, kv_width = shape_.kv_heads * shape_.head_dim;
  const int64_t stride = query_width + 2 * kv_width;
  parallel::rms_norm(*threads_, {shape_.dtype, tokens, query_width, qkv_.data(), stride, nullptr, 0, layer.q_norm,
                                 normed_q_.data(), shape_.eps});
  parallel::rms_norm(*threads_, {shape_.dtype, tokens, kv_width, at(qkv_.data(), 1, query_width), stride, nullptr, 0,
                                 layer.k_norm, normed_k_.data(), shape_.eps});
}

void Decoder::feed_forward(const DecoderLayer& layer, int64_t tokens, const void* x) {
  layer.mixture ? mix(layer, tokens, x) : dense(layer, tokens, x, sublayer_.data());
}

void Decoder::dense(const DecoderLayer& layer, int64_t tokens, const void* x, void* out) {
  const int64_t width = layer.down.in_features;
  project(layer.gate_up, x, gate_up_.data(), tokens);
  parallel::gated_activation(
      *threads_, {shape_.dtype, shape_.activation, tokens, width, gate_up_.data(), 2 * width, activated_.data()});
  project(layer.down, activated_.data(), out, tokens);
}

void Decoder::mix(const DecoderLayer& layer, int64_t tokens, const void* x) {
  const DecoderMixture& mixture = *layer.mixture;
  const int64_t experts = mixture.router.out_features;
  project(mixture.router, x, router_logits_.data(), tokens);
  route({shape_.dtype, tokens, experts, mixture.top_k, router_logits_.data(), experts, mixture.renormalise,
         chosen_.data(), expert_weights_.data()});
  const bool shared = mixture.shared_gate.weight != nullptr;
  if (shared) {
    dense(layer, tokens, x, shared_.data());
    project(mixture.shared_gate, x, shared_gate_.data(), tokens);
  }
  experts_.run(*threads_, mixture.experts,
               {shape_.dtype, tokens, mixture.top_k, x, chosen_.data(), expert_weights_.data(),
                shared ? shared_.data() : nullptr, shared ? shared_gate_.data() : nullptr, sublayer_.data()});
}

RopeAndCacheParams Decoder::rope_params(const DecoderLayer& layer, const DecoderBatch& batch) {
  const DecoderShape& s = shape_;
  const int64_t query_width = s.query_heads * s.head_dim, kv_width = s.kv_heads * s.head_dim;
  const int64_t stride = query_width + 2 * kv_width;
  RopeAndCacheParams p = {};
  p.dtype = s.dtype;
  p.tokens = batch.tokens;
  p.query_heads = s.query_heads;
  p.kv_heads = s.kv_heads;
  p.head_dim = s.head_dim;
  p.q = qkv_.data();
  p.k = at(qkv_.data(), 1, query_width);
  p.v = at(qkv_.data(), 1, query_width + kv_width);
  p.q_stride = p.k_stride = p.v_stride = stride;
  if (s.norms_projections) {
    p.q = normed_q_.data();
    p.q_stride = query_width;
    p.k = normed_k_.data();
    p.k_stride = kv_width;
  }
  p.positions = batch.positions;
  p.cos_sin = layer.cos_sin;
  p.max_position = s.max_position;
  p.k_cache = layer.k_cache;
  p.v_cache = layer.v_cache;
  p.slots = s.pages * s.page_size;
  p.slot_mapping = batch.slot_mapping;
  p.q_norm = s.norms_projections ? nullptr : layer.q_norm;
  p.k_norm = s.norms_projections ? nullptr : layer.k_norm;
  p.eps = s.eps;
  return p;
}

AttentionParams Decoder::attention_params(const DecoderLayer& layer, const DecoderBatch& batch) {
  const DecoderShape& s = shape_;
  AttentionParams p = {};
  p.q_dtype = p.cache_dtype = s.dtype;
  p.sequences = batch.sequences;
  p.tokens = batch.tokens;
  p.query_heads = s.query_heads;
  p.kv_heads = s.kv_heads;
  p.head_dim = s.head_dim;
  p.pages = s.pages;
  p.page_size = s.page_size;
  p.q = s.norms_projections ? normed_q_.data() : qkv_.data();
  p.q_stride = (s.query_heads + (s.norms_projections ? 0 : 2 * s.kv_heads)) * s.head_dim;
  p.k_cache = layer.k_cache;
  p.v_cache = layer.v_cache;
  p.block_tables = batch.block_tables;
  p.table_width = p.table_stride = batch.table_width;
  p.query_start = batch.query_start;
  p.context_lens = batch.context_lens;
  p.out = attended_.data();
  p.scale = s.scale;
  p.softcap = s.softcap;
  p.window = layer.window;
  p.sinks = layer.sinks;
  return p;
}

}  // namespace pearl

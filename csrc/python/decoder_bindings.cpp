#include "python/decoder_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/decoder.h"
#include "cpu/draft_window.h"
#include "python/arguments.h"
#include "python/make_params.h"
#include "python/matrix_arguments.h"
#include "python/work_batch.h"

namespace py = pybind11;

namespace {

struct MixtureArgument : pearl::DecoderMixture {
  MixtureArgument(const MatrixArgument& router, const ExpertLayerArgument& experts, const MatrixArgument& shared_gate,
                  int64_t top_k, bool renormalise)
      : DecoderMixture{router, experts, shared_gate, top_k, renormalise} {}
};

struct LayerArgument : pearl::DecoderLayer {
  LayerArgument(Address input_norm, const MatrixArgument& qkv, Address q_norm, Address k_norm,
                const MatrixArgument& output, Address attention_post_norm, Address mlp_norm,
                const MatrixArgument& gate_up, const MatrixArgument& down, Address mlp_post_norm, Address cos_sin,
                Address k_cache, Address v_cache, int64_t window, Address sinks, const MixtureArgument* mixture)
      : DecoderLayer{pointer<const void>(input_norm),
                     qkv,
                     pointer<const void>(q_norm),
                     pointer<const void>(k_norm),
                     output,
                     pointer<const void>(attention_post_norm),
                     pointer<const void>(mlp_norm),
                     gate_up,
                     down,
                     pointer<const void>(mlp_post_norm),
                     pointer<const float>(cos_sin),
                     pointer<void>(k_cache),
                     pointer<void>(v_cache),
                     window,
                     pointer<const float>(sinks),
                     mixture == nullptr ? std::nullopt : std::optional<pearl::DecoderMixture>(*mixture)} {}
};

struct ShapeArgument : pearl::DecoderShape {
  ShapeArgument(int code, int64_t hidden, int64_t query_heads, int64_t kv_heads, int64_t head_dim, int64_t ffn,
                int64_t vocab_size, int64_t max_position, int64_t pages, int64_t page_size, float residual_eps,
                float eps, float scale, float softcap, bool norms_projections, int activation, float embedding_scale,
                float logits_scale, float logits_softcap, float residual_multiplier)
      : DecoderShape{static_cast<pearl::DType>(code),
                     hidden,
                     query_heads,
                     kv_heads,
                     head_dim,
                     ffn,
                     vocab_size,
                     max_position,
                     pages,
                     page_size,
                     residual_eps,
                     eps,
                     scale,
                     softcap,
                     norms_projections,
                     static_cast<pearl::Activation>(activation),
                     embedding_scale,
                     logits_scale,
                     logits_softcap,
                     residual_multiplier} {}
};

struct EmbeddingArgument : pearl::Embedding {
  EmbeddingArgument(Address table, const MatrixArgument& packed)
      : pearl::Embedding{pointer<const void>(table), packed} {}
};

struct HeadArgument : pearl::DecoderHead {
  HeadArgument(Address norm, const MatrixArgument& matrix, Address ids)
      : DecoderHead{pointer<const void>(norm), matrix, pointer<const int64_t>(ids)} {}
};

struct FeatureArgument : pearl::FeatureInput {
  FeatureArgument(Address token_norm, Address feature_norm, bool norm_before_residual)
      : FeatureInput{pointer<const void>(token_norm), pointer<const void>(feature_norm), norm_before_residual} {}
};

pearl::Decoder* make_decoder(const ShapeArgument& shape, const std::vector<LayerArgument>& layers,
                             const EmbeddingArgument& embedding, const HeadArgument& head, int64_t threads,
                             int64_t beside, const FeatureArgument* features) {
  return new pearl::Decoder(shape, {layers.begin(), layers.end()}, embedding, head, threads, beside,
                            features == nullptr ? std::nullopt : std::optional<pearl::FeatureInput>(*features));
}

/// As Python hands it over: sizes, then the addresses of pearl/models/forward_batch.py's tensors.
struct BatchArgument : pearl::DecoderBatch {
  BatchArgument(int64_t tokens, int64_t sequences, int64_t table_width, int64_t num_logits, Address input_ids,
                Address positions, Address slot_mapping, Address block_tables, Address query_start,
                Address context_lens, Address logits_rows)
      : DecoderBatch{tokens,
                     sequences,
                     table_width,
                     num_logits,
                     pointer<const int64_t>(input_ids),
                     pointer<const int64_t>(positions),
                     pointer<const int64_t>(slot_mapping),
                     pointer<const int32_t>(block_tables),
                     pointer<const int32_t>(query_start),
                     pointer<const int32_t>(context_lens),
                     pointer<const int64_t>(logits_rows),
                     nullptr} {}
};

void forward(pearl::Decoder& decoder, const pearl::DecoderBatch& batch, Address logits,
             const std::vector<int64_t>& hidden_layers, Address hidden) {
  pearl::DecoderBatch whole = batch;
  whole.logits = pointer<void>(logits);
  whole.hidden = {hidden_layers.data(), static_cast<int64_t>(hidden_layers.size()), pointer<void>(hidden)};
  decoder.forward(whole);
}

/// A list of the first `count` values for each sequence, of rows of `width`.
template <class T>
py::list cut_rows(const std::vector<T>& values, const std::vector<int64_t>& counts, int64_t width) {
  py::list rows;
  for (size_t r = 0; r < counts.size(); ++r) {
    const T* row = values.data() + static_cast<int64_t>(r) * width;
    rows.append(py::cast(std::vector<T>(row, row + counts[r])));
  }
  return rows;
}

template <class T>
py::tuple tuple_of(const T* values, int64_t count) {
  py::tuple items(count);
  for (int64_t i = 0; i < count; ++i) items[static_cast<size_t>(i)] = values[i];
  return items;
}

/// For each sequence a list with an entry for each of its tokens: (score, alternatives, their scores), as many
/// alternatives as there are.
py::list list_alternatives(const pearl::AlternativesView& all, const std::vector<int64_t>& counts, int64_t longest) {
  py::list sequences;
  for (size_t r = 0; r < counts.size(); ++r) {
    py::list window;
    for (int64_t step = 0; step < counts[r]; ++step) {
      const int64_t place = static_cast<int64_t>(r) * longest + step;
      const int64_t* tokens = all.tokens + place * all.count;
      const int64_t there = std::find(tokens, tokens + all.count, -1) - tokens;
      window.append(
          py::make_tuple(all.drawn[place], tuple_of(tokens, there), tuple_of(all.scores + place * all.count, there)));
    }
    sequences.append(std::move(window));
  }
  return sequences;
}

using Pairs = std::vector<std::pair<int64_t, int64_t>>;

/// What a decoder that reads features has beside its batch, as in cpu/decoder.h and cpu/draft_window.h.
struct StatesArgument {
  StatesArgument(Address features, Address outputs, Address rows, int64_t count, std::vector<int64_t> base,
                 std::vector<int64_t> size)
      : features(pointer<const void>(features)),
        outputs(pointer<void>(outputs)),
        rows(pointer<void>(rows)),
        count(count),
        base(std::move(base)),
        size(std::move(size)) {}

  pearl::StatesView view() const { return {rows, count, base.data(), size.data()}; }

  const void* features;
  void *outputs, *rows;
  int64_t count;
  std::vector<int64_t> base, size;
};

/// `batch` has a row for each sequence that num_draft has an entry for, the late branches last, of which it computes
/// nothing; `late`: parent, rank, token and state of each (cpu/draft_window.h). `states`: of a decoder that reads
/// features; None of others. Returns tokens, log q, and alternatives if any are asked for; of each a
/// list for each sequence. The first token of a late branch is its own, without log q and alternatives.
py::tuple draft(pearl::WindowDrafter& drafter, const pearl::DecoderBatch& batch, Address logits,
                const std::vector<int64_t>& num_draft, const std::vector<int64_t>& ring_base,
                const std::vector<int64_t>& ring_size, const pearl::SamplingArgument& sampling, int64_t vocab_size,
                uint32_t stream, Address ring, int64_t ring_rows, int64_t alternatives,
                const std::vector<std::array<int64_t, 4>>& late, const Pairs& late_copies,
                const StatesArgument* states) {
  const auto sequences = static_cast<size_t>(batch.sequences);
  const bool fits = states == nullptr || (states->base.size() == sequences && states->size.size() == sequences);
  if (num_draft.size() != sequences || ring_base.size() != sequences || ring_size.size() != sequences ||
      late.size() > sequences || !fits) {
    throw std::invalid_argument("draft_window: num_draft, ring_base and ring_size need an entry for each sequence");
  }
  const int64_t longest = num_draft.empty() ? 0 : *std::max_element(num_draft.begin(), num_draft.end());
  std::vector<int64_t> tokens(sequences * static_cast<size_t>(longest));
  std::vector<float> logprobs(tokens.size());
  // Until the drafter has refused a wrong count, no more memory than for a right one.
  const auto ranked = static_cast<size_t>(std::clamp<int64_t>(alternatives, 0, pearl::kMostAlternatives));
  std::vector<int64_t> alternative_tokens(tokens.size() * ranked, -1);
  std::vector<float> alternative_scores(alternative_tokens.size()), drawn_scores(ranked == 0 ? 0 : tokens.size());
  const pearl::AlternativesView all = {alternatives, alternative_tokens.data(), alternative_scores.data(),
                                       drawn_scores.data()};
  std::vector<pearl::LateBranch> branches;
  for (const auto& [parent, rank, token, state] : late) branches.push_back({parent, rank, token, state});
  std::vector<int64_t> copies;
  for (const auto& [source, destination] : late_copies) copies.insert(copies.end(), {source, destination});
  std::vector<int64_t> counts = num_draft;
  {
    const py::gil_scoped_release without_gil;
    pearl::DecoderBatch first = batch;
    first.sequences -= static_cast<int64_t>(branches.size());
    first.logits = pointer<void>(logits);
    if (states != nullptr) {
      first.features = states->features;
      first.outputs = states->outputs;
    }
    drafter.draft(first, {num_draft.data(), longest, sampling, vocab_size, stream, pointer<void>(ring), ring_rows,
                          ring_base.data(), ring_size.data(), branches.data(), static_cast<int64_t>(branches.size()),
                          copies.data(), static_cast<int64_t>(late_copies.size()), tokens.data(), logprobs.data(), all,
                          states == nullptr ? pearl::StatesView{} : states->view()});
    for (auto r = static_cast<size_t>(first.sequences); r < sequences; ++r) {
      if (tokens[r * static_cast<size_t>(longest)] < 0) counts[r] = 0;
    }
  }
  return py::make_tuple(cut_rows(tokens, counts, longest), cut_rows(logprobs, counts, longest),
                        list_alternatives(all, ranked == 0 ? std::vector<int64_t>() : counts, longest));
}

}  // namespace

void bind_decoder(py::module_& m) {
  py::class_<MixtureArgument>(m, "Mixture")
      .def(py::init<const MatrixArgument&, const ExpertLayerArgument&, const MatrixArgument&, int64_t, bool>());
  py::class_<LayerArgument>(m, "Layer")
      .def(py::init<Address, const MatrixArgument&, Address, Address, const MatrixArgument&, Address, Address,
                    const MatrixArgument&, const MatrixArgument&, Address, Address, Address, Address, int64_t, Address,
                    const MixtureArgument*>());
  py::class_<ShapeArgument>(m, "Shape")
      .def(py::init<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float, float,
                    float, float, bool, int, float, float, float, float>());
  py::class_<pearl::DecoderBatch>(m, "AnyBatch");
  py::class_<BatchArgument, pearl::DecoderBatch>(m, "Batch")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, Address, Address, Address, Address, Address, Address,
                    Address>());
  py::class_<WorkBatch, pearl::DecoderBatch>(m, "WorkBatch").def(py::init<int64_t>()).def("set", &WorkBatch::set);
  py::class_<EmbeddingArgument>(m, "Embedding").def(py::init<Address, const MatrixArgument&>());
  py::class_<HeadArgument>(m, "Head").def(py::init<Address, const MatrixArgument&, Address>());
  py::class_<FeatureArgument>(m, "FeatureInput").def(py::init<Address, Address, bool>());
  py::class_<StatesArgument>(m, "States")
      .def(py::init<Address, Address, Address, int64_t, std::vector<int64_t>, std::vector<int64_t>>());
  py::class_<pearl::Decoder>(m, "Decoder")
      .def(py::init(&make_decoder))
      .def("share_cores", &pearl::Decoder::share_cores)
      .def("forward", &forward, py::call_guard<py::gil_scoped_release>());
  py::class_<pearl::WindowDrafter>(m, "WindowDrafter")
      .def(py::init<pearl::Decoder&>(), py::keep_alive<1, 2>())
      .def("draft", &draft);
}

#include "python/decoder_bindings.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/decoder.h"
#include "cpu/draft_window.h"
#include "python/arguments.h"
#include "python/make_params.h"

namespace py = pybind11;

namespace {

/// As Python hands it over: (in_features, out_features, address of the packed weight, of the scales of an int8 weight
/// or 0, of the bias or 0).
struct MatrixArgument : pearl::PackedMatrix {
  MatrixArgument(int64_t in_features, int64_t out_features, Address weight, Address scale, Address bias)
      : PackedMatrix{scale == 0 ? pearl::WeightFormat::kFull : pearl::WeightFormat::kInt8,
                     in_features,
                     out_features,
                     pointer<const void>(weight),
                     pointer<const float>(scale),
                     pointer<const void>(bias)} {}
};

struct LayerArgument : pearl::DecoderLayer {
  LayerArgument(Address input_norm, const MatrixArgument& qkv, Address q_norm, Address k_norm,
                const MatrixArgument& output, Address post_norm, const MatrixArgument& gate_up,
                const MatrixArgument& down, Address k_cache, Address v_cache, int64_t window)
      : DecoderLayer{pointer<const void>(input_norm),
                     qkv,
                     pointer<const void>(q_norm),
                     pointer<const void>(k_norm),
                     output,
                     pointer<const void>(post_norm),
                     gate_up,
                     down,
                     pointer<void>(k_cache),
                     pointer<void>(v_cache),
                     window} {}
};

struct ShapeArgument : pearl::DecoderShape {
  ShapeArgument(int code, int64_t hidden, int64_t query_heads, int64_t kv_heads, int64_t head_dim, int64_t ffn,
                int64_t vocab_size, int64_t max_position, int64_t pages, int64_t page_size, float eps, float scale)
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
                     eps,
                     scale} {}
};

pearl::Decoder* make_decoder(const ShapeArgument& shape, const std::vector<LayerArgument>& layers, Address embedding,
                             Address norm, const MatrixArgument& head, Address cos_sin, int64_t threads) {
  return new pearl::Decoder(shape, {layers.begin(), layers.end()}, pointer<const void>(embedding),
                            pointer<const void>(norm), head, pointer<const float>(cos_sin), threads);
}

/// As Python hands it over: sizes, then the addresses of pearl/models/forward_batch.py's tensors and of the logits.
struct BatchArgument : pearl::DecoderBatch {
  BatchArgument(int64_t tokens, int64_t sequences, int64_t table_width, int64_t num_logits, Address input_ids,
                Address positions, Address slot_mapping, Address block_tables, Address query_start,
                Address context_lens, Address logits_rows, Address logits)
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
                     pointer<void>(logits)} {}
};

void forward(pearl::Decoder& decoder, const BatchArgument& batch) { decoder.forward(batch); }

void draft(pearl::WindowDrafter& drafter, const BatchArgument& first, Address num_draft, int64_t longest,
           const pearl::SamplingArgument& sampling, int64_t vocab_size, uint32_t stream, Address ring,
           int64_t ring_rows, int64_t ring_size, Address ring_base, Address tokens, Address logprobs) {
  drafter.draft(
      first, {pointer<const int64_t>(num_draft), longest, sampling, vocab_size, stream, pointer<void>(ring), ring_rows,
              ring_size, pointer<const int64_t>(ring_base), pointer<int64_t>(tokens), pointer<float>(logprobs)});
}

}  // namespace

void bind_decoder(py::module_& m) {
  py::class_<MatrixArgument>(m, "Matrix").def(py::init<int64_t, int64_t, Address, Address, Address>());
  py::class_<LayerArgument>(m, "Layer")
      .def(py::init<Address, const MatrixArgument&, Address, Address, const MatrixArgument&, Address,
                    const MatrixArgument&, const MatrixArgument&, Address, Address, int64_t>());
  py::class_<ShapeArgument>(m, "Shape")
      .def(py::init<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, float,
                    float>());
  py::class_<BatchArgument>(m, "Batch")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, Address, Address, Address, Address, Address, Address, Address,
                    Address>());
  py::class_<pearl::Decoder>(m, "Decoder")
      .def(py::init(&make_decoder))
      .def("forward", &forward, py::call_guard<py::gil_scoped_release>());
  py::class_<pearl::WindowDrafter>(m, "WindowDrafter")
      .def(py::init<pearl::Decoder&>(), py::keep_alive<1, 2>())
      .def("draft", &draft, py::call_guard<py::gil_scoped_release>());
}

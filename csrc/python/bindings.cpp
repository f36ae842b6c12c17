// The Python module. Arguments are what pearl_kernels/cpu passes after its checks: pointers as integers (0: none),
// sizes and strides in elements, positional. Every kernel runs without the GIL.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/checks.h"
#include "cpu/copy_blocks.h"
#include "cpu/kernel_table.h"
#include "pearl/params.h"
#include "python/arguments.h"
#include "python/decoder_bindings.h"

namespace py = pybind11;

namespace {

pearl::DType dtype(int code) { return static_cast<pearl::DType>(code); }

/// A matrix of logits as Python hands it over: (address, dtype, rows, stride).
struct LogitsArgument : pearl::LogitsView {
  LogitsArgument(Address data, int code, int64_t rows, int64_t stride)
      : LogitsView{pointer<const void>(data), static_cast<pearl::DType>(code), rows, stride} {}
};

/// Sampling parameters as Python hands them over: five addresses.
struct SamplingArgument : pearl::SamplingView {
  SamplingArgument(Address temperature, Address top_k, Address top_p, Address min_p, Address seed)
      : SamplingView{pointer<const float>(temperature), pointer<const int32_t>(top_k), pointer<const float>(top_p),
                     pointer<const float>(min_p), pointer<const int64_t>(seed)} {}
};

void rms_norm(int code, int64_t rows, int64_t width, Address x, int64_t x_stride, Address residual,
              int64_t residual_stride, Address weight, Address out, float eps) {
  pearl::kernels().rms_norm({dtype(code), rows, width, pointer<const void>(x), x_stride, pointer<void>(residual),
                             residual_stride, pointer<const void>(weight), pointer<void>(out), eps});
}

void silu_and_mul(int code, int64_t rows, int64_t width, Address x, int64_t x_stride, Address out) {
  pearl::kernels().silu_and_mul({dtype(code), rows, width, pointer<const void>(x), x_stride, pointer<void>(out)});
}

void linear(int code, int64_t rows, int64_t in_features, int64_t out_features, Address x, int64_t x_stride,
            Address weight, Address bias, Address out) {
  pearl::kernels().linear({dtype(code), rows, in_features, out_features, pointer<const void>(x), x_stride,
                           pointer<const void>(weight), pointer<const void>(bias), pointer<void>(out)});
}

void rope_and_cache(int code, int64_t tokens, int64_t query_heads, int64_t kv_heads, int64_t head_dim, Address q,
                    int64_t q_stride, Address k, int64_t k_stride, Address v, int64_t v_stride, Address positions,
                    Address cos_sin, int64_t max_position, Address k_cache, Address v_cache, int64_t slots,
                    Address slot_mapping, Address q_norm, Address k_norm, float eps) {
  pearl::RopeAndCacheParams p = {};
  p.dtype = dtype(code);
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
  pearl::check(p);
  pearl::kernels().rope_and_cache(p);
}

void verify_attention(int q_code, int cache_code, int64_t sequences, int64_t tokens, int64_t query_heads,
                      int64_t kv_heads, int64_t head_dim, int64_t pages, int64_t page_size, Address q, int64_t q_stride,
                      Address k_cache, Address v_cache, Address block_tables, int64_t table_width, int64_t table_stride,
                      Address query_start, Address context_lens, Address out, float scale, int64_t window,
                      float softcap) {
  pearl::AttentionParams p = {};
  p.q_dtype = dtype(q_code);
  p.cache_dtype = dtype(cache_code);
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
  pearl::check(p);
  pearl::kernels().verify_attention(p);
}

void sample(const LogitsArgument& logits, const SamplingArgument& sampling, Address positions, int64_t vocab_size,
            uint32_t stream, Address tokens, Address logprobs) {
  pearl::kernels().sample({logits, sampling, pointer<const int64_t>(positions), vocab_size, stream,
                           pointer<int64_t>(tokens), pointer<float>(logprobs)});
}

void verify(const LogitsArgument& logits, const SamplingArgument& sampling, Address draft_tokens, Address row_start,
            Address positions, int64_t requests, int64_t vocab_size, bool coupled, Address draft_logprobs,
            const LogitsArgument& draft_logits, Address draft_rows, Address draft_temperature, Address accepted,
            Address next_token) {
  const pearl::VerifyParams p = {logits,
                                 sampling,
                                 pointer<const int64_t>(draft_tokens),
                                 pointer<const int32_t>(row_start),
                                 pointer<const int64_t>(positions),
                                 requests,
                                 vocab_size,
                                 coupled ? pearl::Rule::kCoupled : pearl::Rule::kRejection,
                                 pointer<const float>(draft_logprobs),
                                 draft_logits,
                                 pointer<const int32_t>(draft_rows),
                                 pointer<const float>(draft_temperature),
                                 pointer<int32_t>(accepted),
                                 pointer<int64_t>(next_token)};
  pearl::check(p);
  pearl::kernels().verify(p);
}

void copy_blocks(Address cache, int64_t pages, int64_t page_bytes, Address pairs, int64_t count) {
  const pearl::CopyBlocksParams p = {pointer<void>(cache), pages, page_bytes, pointer<const int64_t>(pairs), count};
  pearl::check(p);
  pearl::copy_blocks(p);
}

pearl::NoiseParams noise(Address seed, Address position, uint32_t stream, int64_t rows, int64_t vocab_size,
                         Address out) {
  return {pointer<const int64_t>(seed), pointer<const int64_t>(position), stream, rows, vocab_size,
          pointer<float>(out)};
}

void uniform_noise(Address seed, Address position, uint32_t stream, int64_t rows, int64_t vocab_size, Address out) {
  pearl::kernels().uniform_noise(noise(seed, position, stream, rows, vocab_size, out));
}

void gumbel_noise(Address seed, Address position, uint32_t stream, int64_t rows, int64_t vocab_size, Address out) {
  pearl::kernels().gumbel_noise(noise(seed, position, stream, rows, vocab_size, out));
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "CPU kernels on raw pointers. Use pearl_kernels, which checks its arguments.";
  py::class_<LogitsArgument>(m, "Logits").def(py::init<Address, int, int64_t, int64_t>());
  py::class_<SamplingArgument>(m, "Sampling").def(py::init<Address, Address, Address, Address, Address>());

  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def("isa", [] { return pearl::kernels().isa; }, "The instruction set in use: avx512bf16, avx512, avx2 or scalar.");
  m.attr("PANEL_COLUMNS") = pearl::kPanelColumns;
  m.def("rms_norm", &rms_norm, NoGil());
  m.def("silu_and_mul", &silu_and_mul, NoGil());
  m.def("linear", &linear, NoGil());
  m.def("rope_and_cache", &rope_and_cache, NoGil());
  m.def("verify_attention", &verify_attention, NoGil());
  m.def("sample", &sample, NoGil());
  m.def("verify", &verify, NoGil());
  m.def("copy_blocks", &copy_blocks, NoGil());
  m.def("uniform_noise", &uniform_noise, NoGil());
  m.def("gumbel_noise", &gumbel_noise, NoGil());
  bind_decoder(m);
}

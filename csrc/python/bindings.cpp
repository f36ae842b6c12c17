// The CPU's Python module. Arguments are what pearl_kernels passes after its checks: pointers as integers (0: none),
// sizes and strides in elements, positional. Every kernel runs without the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "cpu/checks.h"
#include "cpu/copy_blocks.h"
#include "cpu/kernel_table.h"
#include "cpu/stream_read.h"
#include "pearl/params.h"
#include "python/arguments.h"
#include "python/bind_views.h"
#include "python/decoder_bindings.h"
#include "python/experts_bindings.h"
#include "python/linear_bindings.h"
#include "python/make_params.h"

namespace py = pybind11;

namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;

/// An operator of pearl_kernels.native. The last argument says where it runs: here always None, the CPU.
template <class Params, class... Arguments, class Run>
void bind(py::module_& m, const char* name, Params (*make)(Arguments...), Run run) {
  m.def(name, [make, run](Arguments... arguments, py::handle /*where*/) { run(make(arguments...)); }, NoGil());
}

void bind_shared_operators(py::module_& m) {
  using namespace pearl;
  bind(m, "rms_norm", make_rms_norm, [](const RmsNormParams& p) { kernels().rms_norm(p); });
  bind(m, "silu_and_mul", make_silu_and_mul, [](const GatedParams& p) { kernels().gated_activation(p); });
  bind(m, "gelu_and_mul", make_gelu_and_mul, [](const GatedParams& p) { kernels().gated_activation(p); });
  bind(m, "scale_and_cap", make_scale_and_cap, [](const ScaleAndCapParams& p) { kernels().scale_and_cap(p); });
  bind(m, "rope_and_cache", make_rope_and_cache, [](const RopeAndCacheParams& p) {
    check(p);
    kernels().rope_and_cache(p);
  });
  bind(m, "verify_attention", make_verify_attention, [](const AttentionParams& p) {
    check(p);
    kernels().verify_attention(p, {0, attention_tasks(p)});
  });
  bind(m, "verify", make_verify, [](const VerifyParams& p) {
    check(p);
    kernels().verify(p);
  });
  bind(m, "copy_blocks", make_copy_blocks, [](const CopyBlocksParams& p) {
    check(p);
    copy_blocks(p);
  });
}

void sample(const pearl::LogitsArgument& logits, const pearl::SamplingArgument& sampling, Address positions,
            int64_t vocab_size, uint32_t stream, Address tokens, Address logprobs, int64_t alternatives,
            Address alternative_tokens, Address alternative_scores, Address drawn_scores) {
  pearl::kernels().sample({logits,
                           sampling,
                           pointer<const int64_t>(positions),
                           vocab_size,
                           stream,
                           pointer<int64_t>(tokens),
                           pointer<float>(logprobs),
                           {alternatives, pointer<int64_t>(alternative_tokens), pointer<float>(alternative_scores),
                            pointer<float>(drawn_scores)}});
}

/// verify, with index arrays as Python lists: for callers that would otherwise make a tensor of each. Lists that the
/// operator takes as optional may be empty. Returns accepted counts and next tokens.
py::tuple verify_numbers(const pearl::LogitsArgument& logits, const pearl::SamplingArgument& sampling,
                         const std::vector<int64_t>& draft_tokens, const std::vector<int32_t>& row_start,
                         const std::vector<int64_t>& positions, int64_t vocab_size, int rule,
                         const std::vector<float>& draft_logprobs, const pearl::LogitsArgument& draft_logits,
                         const std::vector<int32_t>& draft_rows, const std::vector<float>& draft_temperature) {
  const auto rows = static_cast<size_t>(logits.rows);
  const auto fits = [](size_t size, size_t expected) { return size == 0 || size == expected; };
  if (row_start.empty() || draft_tokens.size() != rows || positions.size() != rows ||
      !fits(draft_logprobs.size(), rows) || !fits(draft_rows.size(), rows) ||
      !fits(draft_temperature.size(), row_start.size() - 1)) {
    throw std::invalid_argument("verify: each list needs an entry for each row of logits, or for each request");
  }
  std::vector<int32_t> accepted(row_start.size() - 1);
  std::vector<int64_t> next_token(accepted.size());
  pearl::VerifyParams p = {};
  p.logits = logits;
  p.sampling = sampling;
  p.draft_tokens = draft_tokens.data();
  p.row_start = row_start.data();
  p.positions = positions.data();
  p.requests = static_cast<int64_t>(accepted.size());
  p.vocab_size = vocab_size;
  p.rule = static_cast<pearl::Rule>(rule);
  p.draft_logprobs = draft_logprobs.empty() ? nullptr : draft_logprobs.data();
  p.draft_logits = draft_logits;
  p.draft_rows = draft_rows.empty() ? nullptr : draft_rows.data();
  p.draft_temperature = draft_temperature.empty() ? nullptr : draft_temperature.data();
  p.accepted = accepted.data();
  p.next_token = next_token.data();
  {
    const py::gil_scoped_release without_gil;
    check(p);
    pearl::kernels().verify(p);
  }
  return py::make_tuple(accepted, next_token);
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
  bind_views(m);
  bind_shared_operators(m);
  m.def(
      "isa", [] { return pearl::kernels().isa; },
      "The instruction set in use: amx, avx512bf16, avx512, avx2 or scalar.");
  m.def("sample", &sample, NoGil());
  m.def("verify_numbers", &verify_numbers);
  m.def("uniform_noise", &uniform_noise, NoGil());
  m.def("gumbel_noise", &gumbel_noise, NoGil());
  m.def(
      "stream_read",
      [](Address data, int64_t bytes, int64_t streams) {
        return pearl::stream_read(pointer<const void>(data), bytes, streams);
      },
      NoGil());
  m.def(
      "multiply_registers",
      [](int dtype, int64_t steps) {
        return pearl::kernels().multiply_registers(static_cast<pearl::DType>(dtype), steps);
      },
      NoGil());
  bind_linear(m);
  bind_experts(m);
  bind_decoder(m);
}

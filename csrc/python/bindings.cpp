// The CPU's Python module. Arguments are what pearl_kernels passes after its checks: pointers as integers (0: none),
// sizes and strides in elements, positional. Every kernel runs without the GIL.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/checks.h"
#include "cpu/copy_blocks.h"
#include "cpu/kernel_table.h"
#include "cpu/stream_read.h"
#include "pearl/params.h"
#include "python/arguments.h"
#include "python/bind_views.h"
#include "python/decoder_bindings.h"
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
  bind(m, "silu_and_mul", make_silu_and_mul, [](const SiluAndMulParams& p) { kernels().silu_and_mul(p); });
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
            int64_t vocab_size, uint32_t stream, Address tokens, Address logprobs) {
  pearl::kernels().sample({logits, sampling, pointer<const int64_t>(positions), vocab_size, stream,
                           pointer<int64_t>(tokens), pointer<float>(logprobs)});
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
  m.def("isa", [] { return pearl::kernels().isa; }, "The instruction set in use: avx512bf16, avx512, avx2 or scalar.");
  m.def("sample", &sample, NoGil());
  m.def("uniform_noise", &uniform_noise, NoGil());
  m.def("gumbel_noise", &gumbel_noise, NoGil());
  m.def(
      "stream_read", [](Address data, int64_t bytes) { return pearl::stream_read(pointer<const void>(data), bytes); },
      NoGil());
  bind_linear(m);
  bind_decoder(m);
}

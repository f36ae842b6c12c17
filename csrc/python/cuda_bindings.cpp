// The GPU's Python module. Operators take what the CPU's take, but their last argument is (device, stream); those with
// a workspace take its address and size before that, and NAME_workspace says how large it must be. Nothing here waits
// for the GPU. A kernel that cannot take its arguments is a ValueError, any other CUDA error a RuntimeError.
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "cuda/kernels.h"
#include "python/arguments.h"
#include "python/bind_views.h"
#include "python/make_params.h"

namespace py = pybind11;

namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;
using Where = std::pair<int, Address>;  // device number, stream

/// A call's error becomes an exception, and is not left for others to find.
void require(cudaError_t error, const std::string& op) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());
  const std::string words = op + ": CUDA error: " + cudaGetErrorString(error);
  if (error == cudaErrorInvalidValue) throw std::invalid_argument(words + "; the kernel cannot take these arguments");
  throw std::runtime_error(words);
}

/// cuDevicePrimaryCtxGetState, without linking the driver, which may not be there; null if it is not.
using ContextState = int (*)(int device, unsigned* flags, int* active);
ContextState find_context_state() {
  const char* const name = "cuDevicePrimaryCtxGetState";
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 7000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<ContextState>(found)
                                                                       : nullptr;
}

/// Whether the process has used a device. Making another one current would create its context: hundreds of MB there.
bool is_used(int device) {
  static const ContextState state = find_context_state();
  unsigned flags = 0;
  int active = 0;
  return state == nullptr || state(device, &flags, &active) != 0 || active != 0;
}

/// Makes a device current for as long as it lives. A thread whose own is the first only because it has chosen none, and
/// that nobody has used, keeps the device, as with torch's guards.
class DeviceGuard {
 public:
  DeviceGuard(int device, const std::string& op) {
    require(cudaGetDevice(&before_), op);
    if (device == before_) return;
    require(cudaSetDevice(device), op);
    changed_ = true;
  }
  DeviceGuard(const DeviceGuard&) = delete;
  ~DeviceGuard() {
    if (!changed_ || !is_used(before_)) return;
    if (cudaSetDevice(before_) != cudaSuccess) static_cast<void>(cudaGetLastError());
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <class Params>
using Launch = cudaError_t (*)(const Params&, cudaStream_t);

template <class Params>
void run(const char* name, Launch<Params> launch, const Params& params, const Where& where) {
  const DeviceGuard guard(where.first, name);
  require(launch(params, pointer<CUstream_st>(where.second)), name);
}

template <class Params, class... Arguments>
void bind(py::module_& m, const char* name, Params (*make)(Arguments...), Launch<Params> launch) {
  m.def(
      name, [=](Arguments... arguments, const Where& where) { run<Params>(name, launch, make(arguments...), where); },
      NoGil());
}

template <class Params, class... Arguments>
void bind_with_workspace(py::module_& m, const char* name, Params (*make)(Arguments...), Launch<Params> launch,
                         int64_t (*workspace_bytes)(const Params&)) {
  m.def(
      name,
      [=](Arguments... arguments, Address workspace, int64_t bytes, const Where& where) {
        Params params = make(arguments...);
        params.workspace = {pointer<void>(workspace), bytes};
        run<Params>(name, launch, params, where);
      },
      NoGil());
  m.def((std::string(name) + "_workspace").c_str(),
        [=](Arguments... arguments, const Where& where) {
          const DeviceGuard guard(where.first, name);
          return workspace_bytes(make(arguments...));
        },
        NoGil());
}

/// A version of the driver or the runtime: 1000 * major + 10 * minor; 0 without a driver.
int version(cudaError_t (*ask)(int*)) {
  int result = 0;
  require(ask(&result), "version");
  return result;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels on raw pointers. Use pearl_kernels, which checks its arguments.";
  using namespace pearl;
  bind_views(m);
  bind(m, "rms_norm", make_rms_norm, cuda::rms_norm);
  bind(m, "silu_and_mul", make_silu_and_mul, cuda::gated_activation);
  bind(m, "gelu_and_mul", make_gelu_and_mul, cuda::gated_activation);
  bind(m, "scale_and_cap", make_scale_and_cap, cuda::scale_and_cap);
  bind(m, "rope_and_cache", make_rope_and_cache, cuda::rope_and_cache);
  bind(m, "copy_blocks", make_copy_blocks, cuda::copy_blocks);
  bind_with_workspace(m, "verify_attention", make_verify_attention, cuda::verify_attention,
                      cuda::verify_attention_workspace);
  bind_with_workspace(m, "verify", make_verify, cuda::verify, cuda::verify_workspace);
  m.def("verify_attention_shared",
        [](int dtype, int64_t head_dim) { return cuda::verify_attention_shared(static_cast<DType>(dtype), head_dim); });
  m.def("driver_version", [] { return version(cudaDriverGetVersion); });
  m.def("runtime_version", [] { return version(cudaRuntimeGetVersion); });
}

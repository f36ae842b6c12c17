// The kernels that exist once for each instruction set.
#pragma once

#include "cpu/tasks.h"
#include "pearl/params.h"

namespace pearl {

struct KernelTable {
  const char* isa;
  void (*rms_norm)(const RmsNormParams&);
  void (*gated_activation)(const GatedParams&);
  void (*scale_and_cap)(const ScaleAndCapParams&);
  void (*gated_unit)(const GatedUnitParams&);
  void (*combine)(const CombineParams&);
  void (*linear_rows)(const LinearParams&);  // before linear: fills the scratch memory
  void (*linear)(const LinearParams&, Range panels);
  int64_t (*multiply_registers)(DType dtype, int64_t steps);  // returns how many operations that were
  void (*rope_and_cache)(const RopeAndCacheParams&);
  void (*verify_attention)(const AttentionParams&, Range tasks);  // of attention_tasks
  void (*sample)(const SampleParams&);
  void (*verify)(const VerifyParams&);
  void (*uniform_noise)(const NoiseParams&);
  void (*gumbel_noise)(const NoiseParams&);
};

namespace scalar {
const KernelTable& table();
}
namespace avx2 {
const KernelTable& table();
}
namespace avx512 {
const KernelTable& table();
}
namespace avx512bf16 {
const KernelTable& table();
}
namespace amx {
const KernelTable& table();
}

/// The kernels for this CPU: the widest instruction set it has, or the one that the environment variable PEARL_CPU_ISA
/// names. Chosen at the first call. Throws std::runtime_error if the variable names one that cannot run here.
const KernelTable& kernels();

}  // namespace pearl

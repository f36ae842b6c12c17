// All kernels over the vector type that was included before, and their table. One isa_*.cpp each compiles this with its
// own flags into its own namespace, PEARL_ISA. No standard templates in here: a linker may keep the copy of an inline
// function that was compiled for AVX-512 and use it everywhere.
#include "cpu/kernel_table.h"
#include "pearl/params.h"
// In order of dependence.
// clang-format off
#include "cpu/rows.inl"
#include "cpu/math.inl"
#include "cpu/norm.inl"
#include "cpu/activation.inl"
#include "cpu/scaling.inl"
#include "cpu/experts.inl"
#include "cpu/linear_weights.inl"
#include "cpu/linear_prefetch.inl"
#include "cpu/tile_products.inl"
#include "cpu/linear_products.inl"
#include "cpu/linear_tiled.inl"
#include "cpu/linear.inl"
#include "cpu/peak.inl"
#include "cpu/rope.inl"
#include "cpu/attention_tile.inl"
#include "cpu/attention.inl"
#include "cpu/philox.inl"
#include "cpu/cutoff.inl"
#include "cpu/distribution.inl"
#include "cpu/sampling.inl"
#include "cpu/alternatives.inl"
#include "cpu/verification.inl"
#include "cpu/block_verification.inl"
// clang-format on

#define PEARL_STRINGIFY(x) #x
#define PEARL_NAME_OF(x) PEARL_STRINGIFY(x)

namespace pearl::PEARL_ISA {

const KernelTable& table() {
  static constexpr KernelTable kTable = {PEARL_NAME_OF(PEARL_ISA),
                                         rms_norm,
                                         gated_activation,
                                         scale_and_cap,
                                         gated_unit,
                                         combine,
                                         linear_rows,
                                         linear,
                                         multiply_registers,
                                         rope_and_cache,
                                         verify_attention,
                                         sample,
                                         verify,
                                         uniform_noise,
                                         gumbel_noise};
  return kTable;
}

}  // namespace pearl::PEARL_ISA

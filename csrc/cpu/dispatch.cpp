#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernel_table.h"

namespace pearl {
namespace {

struct Candidate {
  const char* name;
  bool supported;
  const KernelTable& (*table)();
};

#ifdef PEARL_X86
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const KernelTable& choose() {
  // Widest first.
  const Candidate candidates[] = {
#ifdef PEARL_X86
      {"avx512bf16", has_avx512() && __builtin_cpu_supports("avx512bf16"), avx512bf16::table},
      {"avx512", has_avx512(), avx512::table},
      {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::table},
#endif
      {"scalar", true, scalar::table},
  };
  const char* wanted = std::getenv("PEARL_CPU_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  std::string supported;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported) continue;
    if (any || std::string(wanted) == candidate.name) return candidate.table();
    supported += std::string(supported.empty() ? "" : ", ") + candidate.name;
  }
  throw std::runtime_error(std::string("PEARL_CPU_ISA=") + wanted + " cannot run on this CPU; it has: " + supported);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace pearl

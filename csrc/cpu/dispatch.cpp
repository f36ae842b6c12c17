#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernel_table.h"

#ifdef PEARL_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#ifdef PEARL_AMX
/// Asks the system, which must keep 8 KB more of each thread that uses the tiles, for all threads of this process.
bool has_amx() {
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;
  constexpr int64_t kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTile) == 0 || (edx & kBFloat16) == 0) return false;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

const KernelTable& choose() {
  // Widest first.
  const Candidate candidates[] = {
#ifdef PEARL_AMX
      {"amx", has_avx512() && __builtin_cpu_supports("avx512bf16") && has_amx(), amx::table},
#endif
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

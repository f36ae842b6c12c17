// What csrc/cuda/ptx.cuh needs in place of PTX: asynchronous copies, ldmatrix and mma, with the layouts of the PTX ISA.
#pragma once

#include <array>
#include <cmath>

#include "warp.h"

namespace emu {

inline void require_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("a misaligned vector access");
}

inline void perform(const AsyncCopy& copy) {
  if (copy.global == nullptr) {
    std::memset(copy.shared, 0, copy.bytes);
  } else {
    std::memcpy(copy.shared, copy.global, copy.bytes);
  }
}

/// The copy's accesses are another fiber's, which comes after what the thread has done so far.
PEARL_UNWATCHED inline void watch(const AsyncCopy& copy) {
  Fiber& fiber = *machine.current->fiber;
  if (fiber.copier == nullptr) fiber.copier = order::create_fiber();
  order::release(fiber.issued);
  order::switch_to(fiber.copier);
  order::acquire(fiber.issued);
  if (copy.global != nullptr) order::reads(copy.global, copy.bytes);
  order::writes(copy.shared, copy.bytes);
  order::switch_to(fiber.watched);
}

/// cp.async of 4, 8 or 16 bytes; zeros where global is null.
inline void async_copy(void* shared, const void* global, size_t bytes) {
  require_aligned(shared, bytes);
  require_aligned(global, bytes);
  const AsyncCopy copy = {shared, global, bytes};
  if (order::kWatches) watch(copy);
  const order::Unwatched unwatched;
  if (machine.async_early) {
    perform(copy);
  } else {
    machine.current->async_open.push_back(copy);
  }
}

/// cp.async.commit_group
inline void async_commit() {
  const order::Unwatched unwatched;
  Thread& t = *machine.current;
  AsyncGroup group = {std::move(t.async_open), make_order()};
  if (t.fiber->copier != nullptr) as_each(&t.fiber->copier, 1, order::release, group.arrival);
  order::switch_to(t.fiber->watched);
  t.async_groups.push_back(std::move(group));
  t.async_open.clear();
}

/// cp.async.wait_group: all but the last `pending` groups of this thread arrive.
inline void async_wait(size_t pending, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  const order::Unwatched unwatched;
  auto& groups = machine.current->async_groups;
  while (groups.size() > pending) {
    for (const AsyncCopy& copy : groups.front().copies) perform(copy);
    if (orders_memory({file, line})) order::acquire(groups.front().arrival);
    groups.erase(groups.begin());
  }
}

/// ldmatrix: `kCount` 8 x 8 matrices of 16-bit elements. Lane 8 i + j gives the address of row j of matrix i. Lane l
/// gets the elements 2 (l % 4) and the next of row l / 4, or of column l / 4 if transposed.
template <int kCount>
std::array<uint32_t, kCount> load_matrices(const void* row, bool transposed) {
  const unsigned lane = machine.current->lane();
  if (lane < 8 * kCount) require_aligned(row, 16);
  const Lanes<const void*> rows = exchange(transposed ? "ldmatrix.trans" : "ldmatrix", 0xFFFFFFFFu, row);
  std::array<uint32_t, kCount> result;
  for (int i = 0; i < kCount; ++i) {
    uint16_t pair[2];
    for (unsigned j = 0; j < 2; ++j) {
      const unsigned r = transposed ? 2 * (lane % 4) + j : lane / 4, c = transposed ? lane / 4 : 2 * (lane % 4) + j;
      pair[j] = static_cast<const uint16_t*>(rows[8 * i + r])[c];
    }
    result[i] = uint32_t{pair[1]} << 16 | pair[0];
  }
  return result;
}

/// One element of a register that holds two.
template <class T>
float element(uint32_t pair, unsigned which) {
  return static_cast<float>(bit_cast<T>(static_cast<uint16_t>(pair >> 16 * which)));
}

/// The exponent of a finite number; `least`: that of its type's subnormal numbers.
PEARL_UNWATCHED inline int exponent_of(float x, int least) {
  const int exponent = static_cast<int>(bit_cast<uint32_t>(x) >> 23 & 0xFF) - 127;
  return exponent < least ? least : exponent;
}

/// x rounded towards zero.
PEARL_UNWATCHED inline float towards_zero(double x) {
  const float rounded = static_cast<float>(x);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(x) ? std::nextafter(rounded, 0.0f) : rounded;
}

/// What a tensor core adds at once: c and kBlock products, as on the A100, which is the least exact of the GPUs that
/// the kernels run on (NVIDIA documents none of this). Products are exact. They and c are aligned to the largest
/// exponent, a product's being the sum of its factors', and cut off, towards zero, one bit below fp32's last; what is
/// left is added exactly and cut off to fp32. (M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, "Numerical behavior of
/// NVIDIA tensor cores", PeerJ Computer Science 7:e330, 2021; F. A. Khattak, M. Mikaitis, "Accurate models of NVIDIA
/// tensor cores", arXiv:2512.07004: A100 blocks of 8 products and 1 bit more, H100 16 and 2 bits.)
inline constexpr int kBlock = 8, kAlignedBits = 24;
template <class T>
PEARL_UNWATCHED float add_products(float c, const float (&a)[kBlock], const float (&b)[kBlock]) {
  constexpr int kLeast = std::is_same<T, __half>::value ? -14 : -126;
  double plain = c;
  int top = c == 0.0f ? -1000 : exponent_of(c, -126);
  for (int k = 0; k < kBlock; ++k) {
    plain += static_cast<double>(a[k]) * b[k];
    if (a[k] == 0.0f || b[k] == 0.0f) continue;
    const int exponent = exponent_of(a[k], kLeast) + exponent_of(b[k], kLeast);
    top = exponent > top ? exponent : top;
  }
  if (!std::isfinite(plain) || top == -1000) return static_cast<float>(plain);
  const double scale = bit_cast<double>(static_cast<uint64_t>(1023 + kAlignedBits - top) << 52);
  int64_t sum = static_cast<int64_t>(c * scale);
  for (int k = 0; k < kBlock; ++k) sum += static_cast<int64_t>(static_cast<double>(a[k]) * b[k] * scale);
  return towards_zero(static_cast<double>(sum) / scale);
}

/// mma.m16n8k16 with fp32 sums: D = A B + C. With g = lane / 4 and t = lane % 4, and pairs of neighbouring columns of A
/// and rows of B in a register: a[0..3] are A's (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8); b[0..1] are B's
/// (2 t, g), (2 t + 8, g); c[0..3] are C's (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1).
template <class T>
PEARL_UNWATCHED void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragment {
    uint32_t a[4], b[2];
  };
  const Fragment mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Lanes<Fragment> lanes = exchange("mma.m16n8k16", 0xFFFFFFFFu, mine);
  const unsigned lane = machine.current->number % kWarp, g = lane / 4, t = lane % 4;
  for (unsigned half = 0; half < 2; ++half) {
    float rows[2][kBlock], columns[2][kBlock];
    for (unsigned k = 0; k < kBlock; ++k) {
      const Fragment row = lanes[4 * g + k / 2];
      for (unsigned i = 0; i < 2; ++i) {
        rows[i][k] = element<T>(row.a[2 * half + i], k % 2);
        columns[i][k] = element<T>(lanes[4 * (2 * t + i) + k / 2].b[half], k % 2);
      }
    }
    for (unsigned i = 0; i < 4; ++i) c[i] = add_products<T>(c[i], rows[i / 2], columns[i % 2]);
  }
}

}  // namespace emu

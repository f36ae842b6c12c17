// What csrc/cuda/ptx.cuh needs in place of PTX: asynchronous copies, ldmatrix and mma, with the layouts of the PTX ISA.
#pragma once

#include <array>

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

/// mma.m16n8k16 with fp32 sums: D = A B + C. With g = lane / 4 and t = lane % 4, and pairs of neighbouring columns of A
/// and rows of B in a register: a[0..3] are A's (g, 2 t), (g + 8, 2 t), (g, 2 t + 8), (g + 8, 2 t + 8); b[0..1] are B's
/// (2 t, g), (2 t + 8, g); c[0..3] are C's (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1). Sums are rounded
/// once.
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragment {
    uint32_t a[4], b[2];
  };
  const Fragment mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Lanes<Fragment> lanes = exchange("mma.m16n8k16", 0xFFFFFFFFu, mine);
  const unsigned g = machine.current->lane() / 4, t = machine.current->lane() % 4;
  double sums[4] = {c[0], c[1], c[2], c[3]};
  for (unsigned k = 0; k < 16; k += 2) {
    const unsigned upper = k / 8, owner = k % 8 / 2;
    const Fragment row = lanes[4 * g + owner], left = lanes[4 * (2 * t) + owner],
                   right = lanes[4 * (2 * t + 1) + owner];
    for (unsigned j = 0; j < 2; ++j) {
      const float top = element<T>(row.a[2 * upper], j), bottom = element<T>(row.a[2 * upper + 1], j);
      const float first = element<T>(left.b[upper], j), second = element<T>(right.b[upper], j);
      sums[0] += static_cast<double>(top) * first;
      sums[1] += static_cast<double>(top) * second;
      sums[2] += static_cast<double>(bottom) * first;
      sums[3] += static_cast<double>(bottom) * second;
    }
  }
  for (int i = 0; i < 4; ++i) c[i] = static_cast<float>(sums[i]);
}

}  // namespace emu

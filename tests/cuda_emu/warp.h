// Barriers, and the intrinsics through which the lanes of a warp exchange values.
#pragma once

#include <cstdint>
#include <type_traits>

#include "fibers.h"
#include "launch.h"

namespace emu {

/// What the lanes of a warp handed over. A lane outside the mask, or one that has ended, shows poison.
template <class T>
class Lanes {
 public:
  PEARL_UNWATCHED Lanes() : first_(&machine.threads[machine.current->number / kWarp * kWarp]) {}
  PEARL_UNWATCHED bool has(unsigned lane) const { return machine.current->participants >> lane & 1; }
  PEARL_UNWATCHED T operator[](unsigned lane) const {
    T value;
    if (has(lane)) {
      __builtin_memcpy(static_cast<void*>(&value), first_[lane].shown, sizeof(T));
    } else {
      __builtin_memset(static_cast<void*>(&value), kPoison, sizeof(T));
    }
    return value;
  }

 private:
  const Thread* first_;
};

/// Hands over a value and waits for the lanes of the mask. The result is to be read before the next exchange.
template <class T>
PEARL_UNWATCHED Lanes<T> exchange(const char* what, unsigned mask, const T& value, bool orders = false) {
  static_assert(sizeof(T) <= kSlotBytes && std::is_trivially_copyable<T>::value, "does not fit a lane's slot");
  Thread& t = *machine.current;
  t.what = what;
  t.mask = mask;
  t.orders = orders;
  if (!(mask >> t.number % kWarp & 1)) fail("a lane is missing from its own mask");
  __builtin_memcpy(t.slot, &value, sizeof(T));
  pause(State::kWaitsForWarp);
  return Lanes<T>();
}

template <class T>
T shuffle(const char* what, unsigned mask, const T& value, unsigned source) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "shuffles take 2, 4 or 8 bytes");
  return exchange(what, mask, value)[source];
}

/// Lane numbers of the first and last lane of the current lane's group of `width`.
struct Group {
  explicit Group(int width)
      : first(machine.current->lane() & ~(static_cast<unsigned>(width) - 1)), last(first + width - 1) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0)
      fail("a shuffle's width must be a power of two up to 32");
  }
  unsigned first, last;
};

template <class T, class Combine>
T reduce(const char* what, unsigned mask, T value, Combine combine) {
  const Lanes<T> lanes = exchange(what, mask, value);
  bool first = true;
  T result{};
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!lanes.has(i)) continue;
    result = first ? lanes[i] : combine(result, lanes[i]);
    first = false;
  }
  return result;
}

PEARL_UNWATCHED inline void block_barrier(const char* what, const Place& place, int vote) {
  Thread& t = *machine.current;
  t.what = what;
  t.place = place;
  t.vote = vote;
  t.orders = orders_memory(place);
  pause(State::kWaitsForBlock);
}

/// bar.sync id, threads: whole warps, and a barrier that __syncthreads does not use.
PEARL_UNWATCHED inline void named_barrier(int id, int threads, const char* file = __builtin_FILE(),
                                          int line = __builtin_LINE()) {
  if (id < 1 || id >= static_cast<int>(kNamedBarriers)) fail("named barriers have the numbers 1 to 15");
  if (threads < 1 || threads % kWarp != 0) fail("a named barrier is for whole warps");
  Thread& t = *machine.current;
  t.what = "bar.sync";
  t.place = {file, line};
  t.id = static_cast<unsigned>(id);
  t.expected = static_cast<unsigned>(threads);
  t.orders = orders_memory(t.place);
  pause(State::kWaitsForNamed);
}

}  // namespace emu

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::block_barrier("__syncthreads", {file, line}, 0);
}
inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::block_barrier("__syncthreads_or", {file, line}, predicate);
  return emu::machine.votes_for > 0;
}
inline int __syncthreads_and(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::block_barrier("__syncthreads_and", {file, line}, predicate);
  return emu::machine.votes_for == emu::machine.votes;
}
inline int __syncthreads_count(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::block_barrier("__syncthreads_count", {file, line}, predicate);
  return emu::machine.votes_for;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::exchange("__syncwarp", mask, 0, emu::orders_memory({file, line}));
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const emu::Group group(width);
  return emu::shuffle("__shfl_sync", mask, value, group.first + (static_cast<unsigned>(source) & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emu::machine.current->lane();
  const bool inside = lane >= emu::Group(width).first + delta;
  return emu::shuffle("__shfl_up_sync", mask, value, inside ? lane - delta : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emu::machine.current->lane();
  const bool inside = lane + delta <= emu::Group(width).last;
  return emu::shuffle("__shfl_down_sync", mask, value, inside ? lane + delta : lane);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const unsigned lane = emu::machine.current->lane(), source = lane ^ static_cast<unsigned>(lane_mask);
  return emu::shuffle("__shfl_xor_sync", mask, value, source <= emu::Group(width).last ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const emu::Lanes<int> lanes = emu::exchange("__ballot_sync", mask, predicate);
  unsigned result = 0;
  for (unsigned i = 0; i < emu::kWarp; ++i) result |= static_cast<unsigned>(lanes.has(i) && lanes[i] != 0) << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) {
  return emu::reduce("__any_sync", mask, static_cast<int>(predicate != 0), [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate) {
  return emu::reduce("__all_sync", mask, static_cast<int>(predicate != 0), [](int a, int b) { return a & b; });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const emu::Lanes<T> lanes = emu::exchange("__match_any_sync", mask, value);
  unsigned result = 0;
  for (unsigned i = 0; i < emu::kWarp; ++i) result |= static_cast<unsigned>(lanes.has(i) && lanes[i] == value) << i;
  return result;
}

// A GPU has these for 32-bit integers.
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  static_assert(std::is_integral<T>::value && sizeof(T) == 4, "32-bit integers");
  return emu::reduce("__reduce_add_sync", mask, value, [](T a, T b) { return static_cast<T>(a + b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  static_assert(std::is_integral<T>::value && sizeof(T) == 4, "32-bit integers");
  return emu::reduce("__reduce_max_sync", mask, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  static_assert(std::is_integral<T>::value && sizeof(T) == 4, "32-bit integers");
  return emu::reduce("__reduce_min_sync", mask, value, [](T a, T b) { return a < b ? a : b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return emu::reduce("__reduce_or_sync", mask, value, [](unsigned a, unsigned b) { return a | b; });
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value) {
  return emu::reduce("__reduce_and_sync", mask, value, [](unsigned a, unsigned b) { return a & b; });
}

/// Fibers run one at a time: the lanes that have not ended are the best that can be said.
inline unsigned __activemask() {
  const unsigned first = emu::machine.current->number / emu::kWarp * emu::kWarp;
  unsigned result = 0;
  for (unsigned i = 0; i < emu::kWarp && first + i < emu::machine.count; ++i) {
    result |= static_cast<unsigned>(emu::machine.threads[first + i].state != emu::State::kEnded) << i;
  }
  return result;
}

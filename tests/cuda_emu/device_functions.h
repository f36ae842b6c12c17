// Device functions of one thread: atomics, cached loads, bits, and arithmetic with a given rounding.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "fibers.h"

namespace emu {

template <class T>
struct Same {
  using type = T;
};
/// A parameter that takes no part in deducing T.
template <class T>
using Given = typename Same<T>::type;

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits of one size");
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

/// The current thread sees the value of an atomic, and with it what that value tells of; its own then tells of what
/// came before its last fence, too.
inline void pass_on_order(void* address) {
  Thread& t = *machine.current;
  if (!order::kWatches || (machine.published.empty() && t.fenced == nullptr)) return;
  const order::Unwatched unwatched;
  std::vector<void*>& told = machine.published[address];
  t.observed.insert(t.observed.end(), told.begin(), told.end());
  if (t.fenced != nullptr && (told.empty() || told.back() != t.fenced)) told.push_back(t.fenced);
}

/// *address becomes change(*address); returns what was there. Threads run one at a time.
template <class T, class Change>
T atomic(T* address, Change change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics take 4 or 8 bytes");
  using Bits = typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type;
  typedef Bits __attribute__((may_alias)) Word;
  Word* const word = reinterpret_cast<Word*>(address);
  const T before = bit_cast<T>(__atomic_load_n(word, __ATOMIC_RELAXED));
  __atomic_store_n(word, bit_cast<Bits>(static_cast<T>(change(before))), __ATOMIC_RELAXED);
  pass_on_order(address);
  return before;
}

/// What the thread's atomics saw before is before what follows; what came before is told of by the atomics that follow.
inline void fence(const Place& place) {
  if (!order::kWatches || !orders_memory(place)) return;
  const order::Unwatched unwatched;
  Thread& t = *machine.current;
  for (void* const order : t.observed) order::acquire(order);
  t.observed.clear();
  t.fenced = make_order();
  order::release(t.fenced);
}

}  // namespace emu

template <class T>
T atomicAdd(T* address, emu::Given<T> value) {
  return emu::atomic(address, [=](T x) { return static_cast<T>(x + value); });
}
template <class T>
T atomicSub(T* address, emu::Given<T> value) {
  return emu::atomic(address, [=](T x) { return static_cast<T>(x - value); });
}
template <class T>
T atomicMax(T* address, emu::Given<T> value) {
  static_assert(std::is_integral<T>::value, "integers");
  return emu::atomic(address, [=](T x) { return x > value ? x : value; });
}
template <class T>
T atomicMin(T* address, emu::Given<T> value) {
  static_assert(std::is_integral<T>::value, "integers");
  return emu::atomic(address, [=](T x) { return x < value ? x : value; });
}
template <class T>
T atomicOr(T* address, emu::Given<T> value) {
  return emu::atomic(address, [=](T x) { return static_cast<T>(x | value); });
}
template <class T>
T atomicAnd(T* address, emu::Given<T> value) {
  return emu::atomic(address, [=](T x) { return static_cast<T>(x & value); });
}
template <class T>
T atomicExch(T* address, emu::Given<T> value) {
  return emu::atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, emu::Given<T> expected, emu::Given<T> value) {
  return emu::atomic(address, [=](T x) { return x == expected ? value : x; });
}
/// Counts up to limit, then starts again at 0.
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emu::atomic(address, [=](unsigned x) { return x >= limit ? 0u : x + 1; });
}

inline void __threadfence(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::fence({file, line});
}
inline void __nanosleep(unsigned) {}

// Loads and stores with a cache hint.
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcg(T* address, emu::Given<T> value) {
  *address = value;
}
template <class T>
void __stcs(T* address, emu::Given<T> value) {
  *address = value;
}

// Bits.
inline int __float_as_int(float x) { return emu::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return emu::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return emu::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return emu::bit_cast<float>(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline unsigned __brev(unsigned x) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1u) << (31 - i);
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(int64_t{a} * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
/// Bytes of the eight bytes {b, a}, chosen by the nibbles of the selector.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7)) & 0xFF;
    result |= ((selector >> 4 * i & 8) != 0 ? (byte & 0x80 ? 0xFF : 0u) : byte) << 8 * i;
  }
  return result;
}

// Integers' max and min as the device has them, without std.
template <class T, class U>
constexpr typename std::enable_if<std::is_arithmetic<T>::value && std::is_arithmetic<U>::value,
                                  typename std::common_type<T, U>::type>::type
max(T a, U b) {
  return a > b ? a : b;
}
template <class T, class U>
constexpr typename std::enable_if<std::is_arithmetic<T>::value && std::is_arithmetic<U>::value,
                                  typename std::common_type<T, U>::type>::type
min(T a, U b) {
  return a < b ? a : b;
}

// Arithmetic. The approximate functions are exact to rounding here: a test's tolerance must allow for a GPU's error.
#define __expf(x) std::exp(static_cast<float>(x))  // glibc has functions of these names
#define __logf(x) std::log(static_cast<float>(x))
#define __log2f(x) std::log2(static_cast<float>(x))
#define __powf(x, y) std::pow(static_cast<float>(x), static_cast<float>(y))
#define __sinf(x) std::sin(static_cast<float>(x))
#define __cosf(x) std::cos(static_cast<float>(x))
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }  // NaN becomes 0
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

// The vector type without intrinsics: sixteen-lane loops, which a compiler turns into whatever the target has.
// This file is also the documentation of the operations; the other instruction sets mirror it.
#pragma once

#include <cstdint>
#include <cstring>

#include "pearl/params.h"

namespace pearl::PEARL_ISA {

inline constexpr int kLanes = 16;
inline constexpr int kPartLanes = 16;
/// The tile of sums that a matrix product can keep in registers: rows at most, and Parts of columns for so many rows.
inline constexpr int kTileRows = 2;
inline constexpr int tile_parts(int) { return 1; }
/// Inputs of a chunk of 16-bit weights; how many bytes ahead of a product its weights are asked for, or 0 for the next
/// chunk in stripes (linear_prefetch.inl).
inline constexpr int64_t kNarrowChunkInputs = 512, kAheadBytes = 0;
/// Attention: rows whose scores, and then whose sums, stay in registers, and Parts of keys or of the head for so many.
inline constexpr int kRowsAtOnce = 1;
inline constexpr int row_parts(int) { return 1; }

struct Vec {
  float lane[kLanes];
};
/// Unsigned 32-bit lanes.
struct Bits {
  uint32_t lane[kLanes];
};
/// All ones or all zeros in each lane.
struct Mask {
  uint32_t lane[kLanes];
};

/// {f(0), ..., f(15)} as a V.
template <class V, class F>
inline V generate(F f) {
  V result;
  for (int i = 0; i < kLanes; ++i) result.lane[i] = f(i);
  return result;
}

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Memory. load_first reads only the first n < 16 elements and sets the other lanes to zero; store_first writes only n.
// bf16 is widened exactly and rounded to nearest even; every NaN becomes the quiet one.

inline Vec broadcast(float x) {
  return generate<Vec>([=](int) { return x; });
}
inline Vec load(const float* p) {
  return generate<Vec>([=](int i) { return p[i]; });
}
inline Vec load(const BFloat16* p) {
  return generate<Vec>([=](int i) { return bits_float(uint32_t{p[i].bits} << 16); });
}
inline void store(float* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = x.lane[i];
}
inline void store(BFloat16* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = float_bits(x.lane[i]);
    const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    p[i].bits = static_cast<uint16_t>(x.lane[i] != x.lane[i] ? 0x7FC0 : rounded);
  }
}
template <class T>
inline Vec load_first(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
inline void store_first(T* p, Vec x, int64_t n) {
  T buffer[kLanes];
  store(buffer, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// Arithmetic. max and min return b if a lane is not ordered, so that a NaN in b survives and one in a does not.

inline Vec operator+(Vec a, Vec b) {
  return generate<Vec>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return generate<Vec>([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return generate<Vec>([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return generate<Vec>([&](int i) { return a.lane[i] / b.lane[i]; });
}
/// a * b + c, fused where the instruction set can.
inline Vec mul_add(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec max(Vec a, Vec b) {
  return generate<Vec>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec min(Vec a, Vec b) {
  return generate<Vec>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}

// Comparison and choice.

inline Mask operator<(Vec a, Vec b) {
  return generate<Mask>([&](int i) { return a.lane[i] < b.lane[i] ? ~0u : 0u; });
}
inline Mask operator>=(Vec a, Vec b) {
  return generate<Mask>([&](int i) { return a.lane[i] >= b.lane[i] ? ~0u : 0u; });
}
inline Mask operator==(Vec a, Vec b) {
  return generate<Mask>([&](int i) { return a.lane[i] == b.lane[i] ? ~0u : 0u; });
}
inline Mask operator<=(Bits a, Bits b) {
  return generate<Mask>([&](int i) { return a.lane[i] <= b.lane[i] ? ~0u : 0u; });
}
/// Lanes [begin, end); either bound may lie outside [0, 16].
inline Mask lane_range(int64_t begin, int64_t end) {
  return generate<Mask>([=](int i) { return i >= begin && i < end ? ~0u : 0u; });
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return generate<Vec>([&](int i) { return m.lane[i] ? yes.lane[i] : no.lane[i]; });
}
/// Bit i is lane i.
inline uint32_t bitmask(Mask m) {
  uint32_t result = 0;
  for (int i = 0; i < kLanes; ++i) result |= (m.lane[i] & 1u) << i;
  return result;
}

// Integers.

inline Bits broadcast_bits(uint32_t x) {
  return generate<Bits>([=](int) { return x; });
}
inline Bits load_bits(const uint32_t* p) {
  return generate<Bits>([=](int i) { return p[i]; });
}
inline void store_bits(uint32_t* p, Bits x) {
  for (int i = 0; i < kLanes; ++i) p[i] = x.lane[i];
}
inline Bits bits_of(Vec x) {
  return generate<Bits>([&](int i) { return float_bits(x.lane[i]); });
}
inline Vec float_of(Bits x) {
  return generate<Vec>([&](int i) { return bits_float(x.lane[i]); });
}
/// The unsigned integer's value, rounded to nearest even.
inline Vec to_float(Bits x) {
  return generate<Vec>([&](int i) { return static_cast<float>(x.lane[i]); });
}
inline Bits operator+(Bits a, Bits b) {
  return generate<Bits>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline Bits operator-(Bits a, Bits b) {
  return generate<Bits>([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline Bits operator^(Bits a, Bits b) {
  return generate<Bits>([&](int i) { return a.lane[i] ^ b.lane[i]; });
}
inline Bits operator&(Bits a, Bits b) {
  return generate<Bits>([&](int i) { return a.lane[i] & b.lane[i]; });
}
inline Bits operator|(Bits a, Bits b) {
  return generate<Bits>([&](int i) { return a.lane[i] | b.lane[i]; });
}
inline Bits shift_left(Bits x, int n) {
  return generate<Bits>([&](int i) { return x.lane[i] << n; });
}
inline Bits shift_right(Bits x, int n) {
  return generate<Bits>([&](int i) { return x.lane[i] >> n; });
}
/// Both halves of the 64-bit products with one factor.
inline void multiply_wide(Bits a, uint32_t factor, Bits& high, Bits& low) {
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t{a.lane[i]} * factor;
    high.lane[i] = static_cast<uint32_t>(product >> 32);
    low.lane[i] = static_cast<uint32_t>(product);
  }
}

// A Part is one register, kPartLanes floats, for a matrix product's tile, where registers are counted. Part has + and
// mul_add, PartBits has shifts. An instruction set that multiplies pairs of bf16 defines PEARL_PAIR_DOTS and has
// dot_pairs and nibble_pairs (simd_avx512.h).

using Part = Vec;
using PartBits = Bits;

inline Part zero_part() { return broadcast(0.0f); }
inline Part load_part(const float* p) { return load(p); }
inline Part load_part(const BFloat16* p) { return load(p); }
inline Part load_part(const int8_t* p) {
  return generate<Vec>([=](int i) { return static_cast<float>(p[i]); });
}
inline PartBits load_part(const uint32_t* p) { return load_bits(p); }
/// The four bits of each lane from bit `shift` on, as a two's complement integer.
inline Part nibble_part(PartBits x, int shift) {
  return generate<Vec>(
      [&](int i) { return static_cast<float>(static_cast<int32_t>(x.lane[i] << (28 - shift)) >> 28); });
}
inline Part broadcast_number(float x) { return broadcast(x); }
inline PartBits broadcast_part(uint32_t x) { return broadcast_bits(x); }

// Across lanes.

inline float reduce_add(Vec x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x.lane[i];
  return sum;
}
inline float reduce_max(Vec x) {
  float result = x.lane[0];
  for (int i = 1; i < kLanes; ++i) result = x.lane[i] > result ? x.lane[i] : result;
  return result;
}
/// Four words from each of four places.
inline Bits load_quarters(const void* a, const void* b, const void* c, const void* d) {
  Bits result;
  const void* quarters[] = {a, b, c, d};
  for (int i = 0; i < 4; ++i) std::memcpy(result.lane + 4 * i, quarters[i], 16);
  return result;
}
/// Transposes the 4 x 4 matrices that the four vectors hold in their lanes 4 j to 4 j + 3.
inline void transpose_4x4(Bits (&x)[4]) {
  for (int block = 0; block < kLanes; block += 4) {
    for (int i = 0; i < 4; ++i) {
      for (int j = i + 1; j < 4; ++j) {
        const uint32_t upper = x[i].lane[block + j];
        x[i].lane[block + j] = x[j].lane[block + i];
        x[j].lane[block + i] = upper;
      }
    }
  }
}

}  // namespace pearl::PEARL_ISA

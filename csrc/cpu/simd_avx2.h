// The vector type in two AVX2 registers. The operations are described in simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "pearl/params.h"

namespace pearl::PEARL_ISA {

inline constexpr int kLanes = 16;
inline constexpr int kPartLanes = 8, kTileRows = 6, kRowsAtOnce = 6;
inline constexpr int row_parts(int rows) { return rows <= 3 ? 4 : 2; }
inline constexpr int tile_parts(int rows) { return rows <= 2 ? 6 : rows == 3 ? 3 : 2; }
inline constexpr int64_t kNarrowChunkInputs = 512, kAheadBytes = 0;  // measured on Zen 3

struct Vec {
  __m256 a, b;  // lanes 0 to 7, 8 to 15
};
struct Bits {
  __m256i a, b;
};
struct Mask {
  __m256i a, b;
};
struct Part {
  __m256 v;
};
struct PartBits {
  __m256i v;
};

inline __m256 widen(__m128i halves) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
/// bf16 bits in 32-bit lanes.
inline __m256i round_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), nan);
}

inline Vec broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Vec load(const BFloat16* p) {
  const auto* halves = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(halves)), widen(_mm_loadu_si128(halves + 1))};
}
inline void store(float* p, Vec x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline void store(BFloat16* p, Vec x) {
  // packus works within 128-bit parts: 0..3 8..11 | 4..7 12..15, which the permutation puts in order.
  const __m256i packed = _mm256_packus_epi32(round_bf16(x.a), round_bf16(x.b));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
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

inline Vec operator+(Vec x, Vec y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Vec operator-(Vec x, Vec y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Vec operator*(Vec x, Vec y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Vec operator/(Vec x, Vec y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Vec mul_add(Vec x, Vec y, Vec z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Vec max(Vec x, Vec y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Vec min(Vec x, Vec y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }

template <int kPredicate>
inline Mask compare(Vec x, Vec y) {
  return {_mm256_castps_si256(_mm256_cmp_ps(x.a, y.a, kPredicate)),
          _mm256_castps_si256(_mm256_cmp_ps(x.b, y.b, kPredicate))};
}
inline Mask operator<(Vec x, Vec y) { return compare<_CMP_LT_OQ>(x, y); }
inline Mask operator>=(Vec x, Vec y) { return compare<_CMP_GE_OQ>(x, y); }
inline Mask operator==(Vec x, Vec y) { return compare<_CMP_EQ_OQ>(x, y); }
inline Mask operator<=(Bits x, Bits y) {
  return {_mm256_cmpeq_epi32(_mm256_min_epu32(x.a, y.a), x.a), _mm256_cmpeq_epi32(_mm256_min_epu32(x.b, y.b), x.b)};
}
inline Mask lane_range(int64_t begin, int64_t end) {
  const int first = begin < 0 ? 0 : begin > kLanes ? kLanes : static_cast<int>(begin);
  const int last = end < 0 ? 0 : end > kLanes ? kLanes : static_cast<int>(end);
  const auto inside = [=](__m256i lane) {
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane),
                               _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane));
  };
  return {inside(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), inside(_mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
inline Vec select(Mask m, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.a, yes.a, _mm256_castsi256_ps(m.a)),
          _mm256_blendv_ps(no.b, yes.b, _mm256_castsi256_ps(m.b))};
}
inline uint32_t bitmask(Mask m) {
  const int low = _mm256_movemask_ps(_mm256_castsi256_ps(m.a)), high = _mm256_movemask_ps(_mm256_castsi256_ps(m.b));
  return static_cast<uint32_t>(low | high << 8);
}

inline Bits broadcast_bits(uint32_t x) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(x));
  return {all, all};
}
inline Bits load_bits(const uint32_t* p) {
  const auto* parts = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(parts), _mm256_loadu_si256(parts + 1)};
}
inline void store_bits(uint32_t* p, Bits x) {
  auto* parts = reinterpret_cast<__m256i*>(p);
  _mm256_storeu_si256(parts, x.a);
  _mm256_storeu_si256(parts + 1, x.b);
}
inline Bits bits_of(Vec x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline Vec float_of(Bits x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
/// Both 16-bit halves convert exactly, so only their sum is rounded.
inline __m256 to_float(__m256i x) {
  const __m256 high = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16));
  const __m256 low = _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xFFFF)));
  return _mm256_add_ps(_mm256_mul_ps(high, _mm256_set1_ps(65536.0f)), low);
}
inline Vec to_float(Bits x) { return {to_float(x.a), to_float(x.b)}; }
inline Bits operator+(Bits x, Bits y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline Bits operator-(Bits x, Bits y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline Bits operator^(Bits x, Bits y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
inline Bits operator&(Bits x, Bits y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline Bits operator|(Bits x, Bits y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
inline Bits shift_left(Bits x, int n) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
inline Bits shift_right(Bits x, int n) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
inline void multiply_wide(__m256i x, __m256i factor, __m256i& high, __m256i& low) {
  const __m256i even = _mm256_mul_epu32(x, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), factor);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
inline void multiply_wide(Bits x, uint32_t factor, Bits& high, Bits& low) {
  const __m256i f = _mm256_set1_epi32(static_cast<int>(factor));
  multiply_wide(x.a, f, high.a, low.a);
  multiply_wide(x.b, f, high.b, low.b);
}

inline Part zero_part() { return {_mm256_setzero_ps()}; }
inline Part load_part(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Part load_part(const BFloat16* p) { return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Part load_part(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline Part nibble_part(PartBits x, int shift) {
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x.v, 28 - shift), 28))};
}
inline void store(float* p, Part x) { _mm256_storeu_ps(p, x.v); }
inline Part operator+(Part x, Part y) { return {_mm256_add_ps(x.v, y.v)}; }
inline Part mul_add(Part x, Part y, Part z) { return {_mm256_fmadd_ps(x.v, y.v, z.v)}; }
inline Part broadcast_number(float x) { return {_mm256_set1_ps(x)}; }
inline PartBits broadcast_part(uint32_t x) { return {_mm256_set1_epi32(static_cast<int>(x))}; }
inline PartBits load_part(const uint32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Part float_of(PartBits x) { return {_mm256_castsi256_ps(x.v)}; }
inline PartBits shift_left(PartBits x, int n) { return {_mm256_slli_epi32(x.v, n)}; }
inline PartBits shift_right(PartBits x, int n) { return {_mm256_srli_epi32(x.v, n)}; }

inline float reduce_add(Vec x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float reduce_max(Vec x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

inline __m256i load_halves(const void* a, const void* b) {
  return _mm256_loadu2_m128i(static_cast<const __m128i*>(b), static_cast<const __m128i*>(a));
}
inline Bits load_quarters(const void* a, const void* b, const void* c, const void* d) {
  return {load_halves(a, b), load_halves(c, d)};
}
inline void transpose_4x4(__m256i& a, __m256i& b, __m256i& c, __m256i& d) {
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b), ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d), cd_high = _mm256_unpackhi_epi32(c, d);
  a = _mm256_unpacklo_epi64(ab_low, cd_low);
  b = _mm256_unpackhi_epi64(ab_low, cd_low);
  c = _mm256_unpacklo_epi64(ab_high, cd_high);
  d = _mm256_unpackhi_epi64(ab_high, cd_high);
}
inline void transpose_4x4(Bits (&x)[4]) {
  transpose_4x4(x[0].a, x[1].a, x[2].a, x[3].a);
  transpose_4x4(x[0].b, x[1].b, x[2].b, x[3].b);
}

}  // namespace pearl::PEARL_ISA

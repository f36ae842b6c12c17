// The vector type in one AVX-512 register. The operations are described in simd_scalar.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "pearl/params.h"

namespace pearl::PEARL_ISA {

inline constexpr int kLanes = 16;
inline constexpr int kPartLanes = 16, kTileRows = 8, kRowsAtOnce = 6;
inline constexpr int row_parts(int) { return 4; }
inline constexpr int tile_parts(int) { return 3; }
inline constexpr int64_t kNarrowChunkInputs = 192, kAheadBytes = 20 << 10;  // measured on Zen 5; a chunk fits into L1

struct Vec {
  __m512 v;
};
struct Bits {
  __m512i v;
};
struct Mask {
  __mmask16 v;
};
using Part = Vec;
using PartBits = Bits;

inline Mask lane_range(int64_t begin, int64_t end) {
  const uint32_t below_begin = begin <= 0 ? 0 : begin >= kLanes ? 0xFFFF : (1u << begin) - 1;
  const uint32_t below_end = end <= 0 ? 0 : end >= kLanes ? 0xFFFF : (1u << end) - 1;
  return {static_cast<__mmask16>(below_end & ~below_begin)};
}

inline Vec widen(__m256i halves) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))}; }
/// By integers, whatever the number.
inline __m256i narrow_any(Vec x) {
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7FC0)));
}

inline __m256i narrow(Vec x) {
#ifdef __AVX512BF16__
  // The instruction takes subnormal numbers for zero and keeps what a NaN holds.
  constexpr int kNaN = 0x01 | 0x80, kSubnormal = 0x20;
  const __mmask16 special = _mm512_fpclass_ps_mask(x.v, kNaN | kSubnormal);
  if (__builtin_expect(special == 0, 1)) return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x.v));
#endif
  return narrow_any(x);
}

inline Vec broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const BFloat16* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x.v); }
inline void store(BFloat16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
inline Vec load_first(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lane_range(0, n).v, p)}; }
inline Vec load_first(const BFloat16* p, int64_t n) { return widen(_mm256_maskz_loadu_epi16(lane_range(0, n).v, p)); }
inline void store_first(float* p, Vec x, int64_t n) { _mm512_mask_storeu_ps(p, lane_range(0, n).v, x.v); }
inline void store_first(BFloat16* p, Vec x, int64_t n) { _mm256_mask_storeu_epi16(p, lane_range(0, n).v, narrow(x)); }

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vec mul_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }

inline Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask operator>=(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
inline Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask operator<=(Bits a, Bits b) { return {_mm512_cmple_epu32_mask(a.v, b.v)}; }
inline Vec select(Mask m, Vec yes, Vec no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }
inline uint32_t bitmask(Mask m) { return m.v; }

inline Bits broadcast_bits(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
inline Bits load_bits(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bits(uint32_t* p, Bits x) { _mm512_storeu_si512(p, x.v); }
inline Bits bits_of(Vec x) { return {_mm512_castps_si512(x.v)}; }
inline Vec float_of(Bits x) { return {_mm512_castsi512_ps(x.v)}; }
inline Vec to_float(Bits x) { return {_mm512_cvtepu32_ps(x.v)}; }
inline Bits operator+(Bits a, Bits b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Bits operator-(Bits a, Bits b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Bits operator^(Bits a, Bits b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Bits operator&(Bits a, Bits b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Bits operator|(Bits a, Bits b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Bits shift_left(Bits x, int n) { return {_mm512_slli_epi32(x.v, n)}; }
inline Bits shift_right(Bits x, int n) { return {_mm512_srli_epi32(x.v, n)}; }
inline void multiply_wide(Bits a, uint32_t factor, Bits& high, Bits& low) {
  const __m512i f = _mm512_set1_epi32(static_cast<int>(factor));
  const __m512i even = _mm512_mul_epu32(a.v, f), odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), f);
  high.v = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low.v = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}
inline Part zero_part() { return {_mm512_setzero_ps()}; }
inline Part load_part(const float* p) { return load(p); }
inline Part load_part(const BFloat16* p) { return load(p); }
inline Part load_part(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline PartBits load_part(const uint32_t* p) { return load_bits(p); }
/// A permutation looks at the lowest four bits of its indices alone.
inline Part nibble_part(PartBits x, int shift) {
  const __m512 integers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return {_mm512_permutexvar_ps(_mm512_srli_epi32(x.v, shift), integers)};
}
inline Part broadcast_number(float x) { return broadcast(x); }
inline PartBits broadcast_part(uint32_t x) { return broadcast_bits(x); }

#ifdef __AVX512BF16__
#define PEARL_PAIR_DOTS
/// Adds the products of two pairs of bf16 in each lane. Subnormal numbers count as zero.
inline Part dot_pairs(PartBits a, PartBits b, Part sum) {
  return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
/// Of both halves of each lane the four bits from bit `shift` on, as nibble_part's integers in bf16. The table's halves
/// are the same, because a permutation looks at five bits.
inline PartBits nibble_pairs(PartBits x, int shift) {
  const __m256i integers =
      _mm256_setr_epi16(0, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0,  // 0 to 7
                        static_cast<int16_t>(0xC100), static_cast<int16_t>(0xC0E0), static_cast<int16_t>(0xC0C0),
                        static_cast<int16_t>(0xC0A0), static_cast<int16_t>(0xC080), static_cast<int16_t>(0xC040),
                        static_cast<int16_t>(0xC000), static_cast<int16_t>(0xBF80));
  return {_mm512_permutexvar_epi16(_mm512_srli_epi32(x.v, shift), _mm512_broadcast_i64x4(integers))};
}
#endif

inline float reduce_add(Vec x) { return _mm512_reduce_add_ps(x.v); }
inline float reduce_max(Vec x) { return _mm512_reduce_max_ps(x.v); }

inline __m128i load_quarter(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
/// Broadcasts that a mask cuts come from memory without a shuffle.
inline Bits load_quarters(const void* a, const void* b, const void* c, const void* d) {
  __m512i result = _mm512_castsi128_si512(load_quarter(a));
  result = _mm512_mask_broadcast_i32x4(result, 0x00F0, load_quarter(b));
  result = _mm512_mask_broadcast_i32x4(result, 0x0F00, load_quarter(c));
  return {_mm512_mask_broadcast_i32x4(result, 0xF000, load_quarter(d))};
}
inline void transpose_4x4(Bits (&x)[4]) {
  const __m512i ab_low = _mm512_unpacklo_epi32(x[0].v, x[1].v), ab_high = _mm512_unpackhi_epi32(x[0].v, x[1].v);
  const __m512i cd_low = _mm512_unpacklo_epi32(x[2].v, x[3].v), cd_high = _mm512_unpackhi_epi32(x[2].v, x[3].v);
  x[0].v = _mm512_unpacklo_epi64(ab_low, cd_low);
  x[1].v = _mm512_unpackhi_epi64(ab_low, cd_low);
  x[2].v = _mm512_unpacklo_epi64(ab_high, cd_high);
  x[3].v = _mm512_unpackhi_epi64(ab_high, cd_high);
}

}  // namespace pearl::PEARL_ISA

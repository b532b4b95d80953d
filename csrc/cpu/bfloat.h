// fp32 as a sum of bf16 numbers, for instructions that multiply those, and tiles of such numbers. AVX-512.
#pragma once

#include "read.h"

namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTilePairs = 16;
constexpr int64_t kTileDepth = 32;                        // terms per product
constexpr int64_t kTileWords = kTileRows * kTileDepth;    // bf16 numbers in a full tile

// 24 significant bits are three times 8: `value` becomes value minus its nearest bf16, which is returned as 16 bits
// in the low half of each lane. Subtraction is exact. For finite numbers whose parts are normal; NaN,
// which rounding might carry into the sign, stays NaN.
EPMQ_INLINE __m512i take_bfloat(__m512& value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __mmask16 number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i rounded = _mm512_mask_add_epi32(quiet, number, bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __m512i top = _mm512_srli_epi32(rounded, 16);
  value = _mm512_sub_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(top, 16)));
  return top;
}

// 32 numbers as bf16 words, the next part of each.
EPMQ_INLINE __m512i take_words(__m512& first, __m512& second) {
  const __m256i low = _mm512_cvtepi32_epi16(take_bfloat(first)), high = _mm512_cvtepi32_epi16(take_bfloat(second));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Parts that hold every number of a type.
inline int parts_of(epmq::Dtype dtype) {
  return dtype == epmq::Dtype::kBfloat ? 1 : dtype == epmq::Dtype::kHalf ? 2 : 3;
}

// Whether all lanes are 0 or of a magnitude in [low, high], given as bits: false for infinities and NaN.
EPMQ_INLINE bool all_between(__m512 value, uint32_t low, uint32_t high) {
  const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
  const __mmask16 zero = _mm512_cmpeq_epi32_mask(magnitude, _mm512_setzero_si512());
  const __m512i above = _mm512_sub_epi32(magnitude, _mm512_set1_epi32((int)low));
  const __mmask16 inside = _mm512_cmple_epu32_mask(above, _mm512_set1_epi32((int)(high - low)));
  return (__mmask16)(zero | inside) == 0xffff;
}

constexpr uint32_t bits_of_power(int exponent) { return (uint32_t)(exponent + 127) << 23; }

// ---- transposition --------------------------------------------------------------------------------------------------

// v[i] lane j <-> v[j] lane i.
EPMQ_INLINE void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  EPMQ_UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  EPMQ_UNROLL
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  EPMQ_UNROLL
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  EPMQ_UNROLL
  for (int i = 0; i < 8; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

}  // namespace

// Four-bit codes and activations as bf16 words, for kernels that multiply those. AVX-512.
//
// A row of W is cut into units of 128 codes, 64 bytes, and a unit into steps of 32. Steps are summed in segments, whole
// units or parts of one, of which each lies in one group.
#pragma once

#include "bfloat.h"

namespace {

// Hands out parts of a piece of memory, or counts what they would take.
struct Scratch {
  char* at;

  char* operator()(int64_t bytes) {
    char* begin = at;
    at += (bytes + 63) / 64 * 64;
    return begin;
  }
};

struct CodeWords {
  static constexpr int64_t unit = epmq::kWordUnit, step = kTileDepth, unit_steps = unit / step;
  // No product or partial sum of q - z with a number of this range, or with its parts, is denormal or overflows.
  static constexpr uint32_t lowest = bits_of_power(-103), highest = bits_of_power(96);

  static bool takes(const epmq::MatmulArgs& a) {
    return a.bits == 4 && (a.group_size >= a.k || a.group_size % step == 0);
  }

  static int64_t units_of(const epmq::MatmulArgs& a) { return (a.k + unit - 1) / unit; }

  // Steps per segment.
  static int64_t segment_of(const epmq::MatmulArgs& a) {
    if (a.group_size >= a.k || a.group_size % unit == 0) return unit_steps;
    return a.group_size % (2 * step) == 0 ? 2 : 1;
  }

  // The group of each segment of a row.
  static void groups_of(const epmq::MatmulArgs& a, int32_t* groups) {
    const int64_t segment = segment_of(a);
    for (int64_t s = 0; s < units_of(a) * unit_steps / segment; s++) {
      const int64_t group = s * segment * step / a.group_size;
      groups[s] = (int32_t)(group < a.groups ? group : a.groups - 1);
    }
  }

  // ---- order ----------------------------------------------------------------------------------------------------

  // Long segments: nibble j of each 16-bit word of 64 bytes goes to step j, so step j holds codes 4 e + j.
  // Others: bytes of 32 codes spread to words, low nibbles first, so a step holds its even codes, then its odd ones.
  // Steps are `stride` words apart.
  template <bool Long>
  static int64_t slot_of(int64_t at, int64_t stride) {
    if (Long) return at % 4 * stride + at / 4;
    return at / step * stride + at % 2 * 16 + at % step / 2;
  }

  // 128 words of x in the order of the four steps.
  template <bool Long>
  static EPMQ_INLINE void order(const __m512i (&in)[4], __m512i (&out)[4]) {
    uint16_t index[32];
    for (int j = 0; j < 4; j++) {
      for (int e = 0; e < 32; e++) index[e] = (uint16_t)(Long ? (4 * e + j) % 64 : e % 16 * 2 + e / 16);
      const __m512i from = _mm512_loadu_si512(index);
      if (Long) {
        const __m512i first = _mm512_permutex2var_epi16(in[0], from, in[1]);
        out[j] = _mm512_mask_blend_epi32(0xff00, first, _mm512_permutex2var_epi16(in[2], from, in[3]));
      } else {
        out[j] = _mm512_permutexvar_epi16(from, in[j]);
      }
    }
  }

  // ---- activations ----------------------------------------------------------------------------------------------

  // 128 numbers of row m of x from feature k on, zero past its end.
  static EPMQ_INLINE void read_unit(const epmq::MatmulArgs& a, int64_t m, int64_t k, __m512 (&values)[8]) {
    const int64_t row = m * a.x_row_stride;
    if (a.x_column_stride == 1 && k + unit <= a.k) {
      for (int i = 0; i < 8; i++) values[i] = read_vector(a.x, a.x_dtype, row + k + 16 * i).r;
    } else {
      float numbers[unit];
      for (int at = 0; at < unit; at++)
        numbers[at] = k + at < a.k ? read_element(a.x, a.x_dtype, row + (k + at) * a.x_column_stride) : 0.0f;
      for (int i = 0; i < 8; i++) values[i] = _mm512_loadu_ps(numbers + 16 * i);
    }
  }

  // ---- weights --------------------------------------------------------------------------------------------------

  template <bool Symmetric>
  static EPMQ_INLINE const uint16_t* table_of(const epmq::WordMatmulArgs& a, int64_t row, int64_t group) {
    return a.words + step * (Symmetric ? 8 : a.zeros[row * a.zero_stride + group]);
  }

  // q - z of a whole unit of a row, step by step. groups: of its segments, `segment` steps each. codes: its 64 bytes.
  template <bool Long, bool Symmetric>
  static EPMQ_INLINE void unit_words(const epmq::WordMatmulArgs& a, int64_t row, const int32_t* groups,
                                     int64_t segment, const uint8_t* codes, __m512i (&out)[4]) {
    if (Long) {
      const __m512i table = _mm512_loadu_si512(table_of<Symmetric>(a, row, groups[0]));
      const __m512i words = _mm512_loadu_si512(codes);
      out[0] = _mm512_permutexvar_epi16(words, table);
      out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table);
      out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table);
      out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table);
    } else {
      EPMQ_UNROLL
      for (int j = 0; j < unit_steps; j++) {
        const __m512i table = _mm512_loadu_si512(table_of<Symmetric>(a, row, groups[j / segment]));
        const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(codes + 16 * j)));
        const __m512i words = _mm512_inserti64x4(_mm512_castsi256_si512(bytes), _mm256_srli_epi16(bytes, 4), 1);
        out[j] = _mm512_permutexvar_epi16(words, table);
      }
    }
  }

  // The last unit of a row, zero past its end; steps are `stride` words apart.
  template <bool Long, bool Symmetric>
  static void decode_end(const epmq::WordMatmulArgs& a, int64_t row, int64_t k, int64_t stride, uint16_t* out) {
    const uint8_t* codes = a.packed + row * a.row_bytes;
    for (int64_t at = 0; at < unit; at++) {
      uint16_t value = 0;
      if (k + at < a.k)
        value = table_of<Symmetric>(a, row, (k + at) / a.group_size)[codes[(k + at) / 2] >> (4 * (at % 2)) & 15];
      out[slot_of<Long>(at, stride)] = value;
    }
  }

  // ---- results --------------------------------------------------------------------------------------------------

  // 16 numbers of y, or those of a mask, in x's type.
  static EPMQ_INLINE void write(const epmq::WordMatmulArgs& a, int64_t at, __mmask16 mask, __m512 y) {
    if (a.x_dtype == epmq::Dtype::kFloat) {
      _mm512_mask_storeu_ps((float*)a.y + at, mask, y);
    } else if (a.x_dtype == epmq::Dtype::kHalf) {
      _mm256_mask_storeu_epi16((uint16_t*)a.y + at, mask, _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __mmask16 nan = _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q);
      __m512 rest = y;
      const __m512i words = _mm512_mask_mov_epi32(take_bfloat(rest), nan, _mm512_set1_epi32(0x7fc0));
      _mm256_mask_storeu_epi16((uint16_t*)a.y + at, mask, _mm512_cvtepi32_epi16(words));
    }
  }
};

}  // namespace

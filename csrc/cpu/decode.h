// From packed codes to fp32 weights (q - z) * s, one block of 8 * lanes codes at a time, in the order of kernels.h.
#pragma once

#include "read.h"

namespace {

constexpr int kChunk = 32;                     // codes in 16 bytes
constexpr int kBlock = 8 * Vec::lanes;         // codes per block
constexpr int kBlockChunks = Vec::lanes / 4;   // chunks per block

// Where code `at` of a block goes: vector * lanes + lane. The inverse of the formula in kernels.h.
EPMQ_INLINE int slot_of(int at) {
  const int c = at / kChunk, h = at / 16 % 2, i = at / 4 % 4, o = at / 2 % 2, p = at % 2;
  return (4 * p + 2 * h + o) * Vec::lanes + 4 * c + i;
}

// The grid of one weight row. `groups` holds the group of each unit of codes (a block, or a chunk where blocks mix
// groups) and is shared by all rows. A symmetric row has one zero point, and zero_mask 0 to find it for every group.
struct RowGrid {
  const float* scales;   // [G]
  const uint8_t* zeros;  // [G], or one
};

// Two 16-byte tables per zero point turn four-bit codes into the low and high bytes of bf16(q - z), which is exact.
// Uniform: the whole block is in one group.
template <bool Uniform>
struct Lookup;

#if defined(EPMQ_AVX512)

template <bool Uniform>
struct Lookup {
  __m512i low, high;
  Vec scale;

  EPMQ_INLINE Lookup(const uint8_t* tables, RowGrid grid, int64_t zero_mask, const int32_t* groups) {
    const __m128i* table = (const __m128i*)(tables + 32 * grid.zeros[groups[0] & zero_mask]);
    low = _mm512_broadcast_i32x4(_mm_loadu_si128(table));
    high = _mm512_broadcast_i32x4(_mm_loadu_si128(table + 1));
    scale = Vec::broadcast(grid.scales[groups[0]]);
    if (!Uniform) {
      insert<1>(tables, grid, zero_mask, groups[1]);
      insert<2>(tables, grid, zero_mask, groups[2]);
      insert<3>(tables, grid, zero_mask, groups[3]);
    }
  }

  template <int Chunk>
  EPMQ_INLINE void insert(const uint8_t* tables, RowGrid grid, int64_t zero_mask, int32_t group) {
    const __m128i* table = (const __m128i*)(tables + 32 * grid.zeros[group & zero_mask]);
    low = _mm512_inserti32x4(low, _mm_loadu_si128(table), Chunk);
    high = _mm512_inserti32x4(high, _mm_loadu_si128(table + 1), Chunk);
    scale = {_mm512_insertf32x4(scale.r, _mm_set1_ps(grid.scales[group]), Chunk)};
  }

  // w[j]: vector j of the block.
  EPMQ_INLINE void weights(const uint8_t* codes, Vec (&w)[8]) const {
    const __m512i nibble = _mm512_set1_epi8(15), upper = _mm512_set1_epi32((int)0xffff0000u);
    const __m512i bytes = _mm512_loadu_si512(codes);
    const __m512i planes[2] = {_mm512_and_si512(bytes, nibble), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), nibble)};
    EPMQ_UNROLL
    for (int p = 0; p < 2; p++) {
      const __m512i l = _mm512_shuffle_epi8(low, planes[p]), h = _mm512_shuffle_epi8(high, planes[p]);
      const __m512i pairs[2] = {_mm512_unpacklo_epi8(l, h), _mm512_unpackhi_epi8(l, h)};
      EPMQ_UNROLL
      for (int i = 0; i < 2; i++) {
        w[4 * p + 2 * i] = Vec{_mm512_castsi512_ps(_mm512_slli_epi32(pairs[i], 16))} * scale;
        w[4 * p + 2 * i + 1] = Vec{_mm512_castsi512_ps(_mm512_and_si512(pairs[i], upper))} * scale;
      }
    }
  }
};

#elif defined(EPMQ_AVX2)

template <bool Uniform>
struct Lookup {
  __m256i low, high;
  Vec scale;

  EPMQ_INLINE Lookup(const uint8_t* tables, RowGrid grid, int64_t zero_mask, const int32_t* groups) {
    const __m128i* table = (const __m128i*)(tables + 32 * grid.zeros[groups[0] & zero_mask]);
    low = _mm256_broadcastsi128_si256(_mm_loadu_si128(table));
    high = _mm256_broadcastsi128_si256(_mm_loadu_si128(table + 1));
    scale = Vec::broadcast(grid.scales[groups[0]]);
    if (!Uniform) {
      const __m128i* second = (const __m128i*)(tables + 32 * grid.zeros[groups[1] & zero_mask]);
      low = _mm256_inserti128_si256(low, _mm_loadu_si128(second), 1);
      high = _mm256_inserti128_si256(high, _mm_loadu_si128(second + 1), 1);
      scale = {_mm256_insertf128_ps(scale.r, _mm_set1_ps(grid.scales[groups[1]]), 1)};
    }
  }

  // w[j]: vector j of the block.
  EPMQ_INLINE void weights(const uint8_t* codes, Vec (&w)[8]) const {
    const __m256i nibble = _mm256_set1_epi8(15), upper = _mm256_set1_epi32((int)0xffff0000u);
    const __m256i bytes = _mm256_loadu_si256((const __m256i*)codes);
    const __m256i planes[2] = {_mm256_and_si256(bytes, nibble), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble)};
    EPMQ_UNROLL
    for (int p = 0; p < 2; p++) {
      const __m256i l = _mm256_shuffle_epi8(low, planes[p]), h = _mm256_shuffle_epi8(high, planes[p]);
      const __m256i pairs[2] = {_mm256_unpacklo_epi8(l, h), _mm256_unpackhi_epi8(l, h)};
      EPMQ_UNROLL
      for (int i = 0; i < 2; i++) {
        w[4 * p + 2 * i] = Vec{_mm256_castsi256_ps(_mm256_slli_epi32(pairs[i], 16))} * scale;
        w[4 * p + 2 * i + 1] = Vec{_mm256_castsi256_ps(_mm256_and_si256(pairs[i], upper))} * scale;
      }
    }
  }
};

#else

template <bool Uniform>
struct Lookup {
  Vec zero, scale;

  EPMQ_INLINE Lookup(const uint8_t*, RowGrid grid, int64_t zero_mask, const int32_t* groups)
      : zero(Vec::broadcast((float)grid.zeros[groups[0] & zero_mask])), scale(Vec::broadcast(grid.scales[groups[0]])) {}

  EPMQ_INLINE void weights(const uint8_t* codes, Vec (&w)[8]) const {
    for (int p = 0; p < 2; p++)
      for (int h = 0; h < 2; h++)
        for (int o = 0; o < 2; o++) {
          uint8_t q[4];
          for (int i = 0; i < 4; i++) q[i] = (uint8_t)(codes[8 * h + 2 * i + o] >> (4 * p) & 15);
          w[4 * p + 2 * h + o] = (Vec::load_bytes(q) - zero) * scale;
        }
  }
};

#endif

EPMQ_INLINE float read_scale(const epmq::MatmulArgs& a, int64_t row, int64_t group) {
  const int64_t at = row * a.scale_stride + group;
  if (a.scale_dtype == epmq::Dtype::kFloat) return ((const float*)a.scales)[at];
  const uint16_t bits = ((const uint16_t*)a.scales)[at];
  return a.scale_dtype == epmq::Dtype::kHalf ? half_bits_to_float(bits) : bfloat_bits_to_float(bits);
}

EPMQ_INLINE uint8_t read_zero(const epmq::MatmulArgs& a, int64_t row, int64_t group) {
  return a.zeros ? a.zeros[row * a.zero_stride + group] : (uint8_t)(1 << (a.bits - 1));
}

// The grid of a row; scales that are not fp32 are converted into `converted`, [G].
EPMQ_INLINE RowGrid grid_of(const epmq::MatmulArgs& a, int64_t row, float* converted, const uint8_t* middle) {
  RowGrid grid = {(const float*)a.scales + row * a.scale_stride, a.zeros ? a.zeros + row * a.zero_stride : middle};
  if (a.scale_dtype != epmq::Dtype::kFloat) {
    int64_t g = 0;
    for (; g + Vec::lanes <= a.groups; g += Vec::lanes)
      read_vector(a.scales, a.scale_dtype, row * a.scale_stride + g).store(converted + g);
    for (; g < a.groups; g++) converted[g] = read_scale(a, row, g);
    grid.scales = converted;
  }
  return grid;
}

// The slow path: any width, any group size, and the end of a row. Weights past the end are 0.
inline void decode_any(const epmq::MatmulArgs& a, int64_t row, int64_t block, Vec (&w)[8]) {
  const uint8_t* bytes = a.packed + row * a.row_bytes;
  float slots[kBlock];
  const int64_t begin = block * kBlock;
  const uint32_t top = (1u << a.bits) - 1;
  int64_t group = -1, next = begin;
  float scale = 0.0f, zero = 0.0f;
  for (int at = 0; at < kBlock; at++) {
    const int64_t k = begin + at;
    float value = 0.0f;
    if (k < a.k) {
      if (k >= next) {
        group = k / a.group_size;
        next = (group + 1) * a.group_size;
        scale = read_scale(a, row, group);
        zero = (float)read_zero(a, row, group);
      }
      const int64_t bit = k * a.bits;
      uint32_t field = bytes[bit >> 3];
      if ((bit & 7) + a.bits > 8) field |= (uint32_t)bytes[(bit >> 3) + 1] << 8;
      value = ((float)(field >> (bit & 7) & top) - zero) * scale;
    }
    slots[slot_of(at)] = value;
  }
  for (int j = 0; j < 8; j++) w[j] = Vec::load(slots + j * Vec::lanes);
}

}  // namespace

// A batch packed into tiles of bf16 parts, pairs of rows side by side, and sums of products added to running ones.
//
// A number is an exact sum of one (bf16), two (fp16) or three (fp32) bf16 parts, each at most 2^-8 of the one before.
#pragma once

#include "bfloat.h"

namespace {

struct PairPacking {
  static constexpr int64_t pair = 2 * kTileRows;  // columns of two operands
  // Parts of these numbers are normal, so they are exact; products of parts below 2^-126 count as zero.
  static constexpr uint32_t lowest = bits_of_power(-100), highest = bits_of_power(56);
  static constexpr int64_t part_steps = epmq::kPackDepth / kTileDepth;  // that a sum runs over

  static EPMQ_INLINE int64_t part_end(int64_t steps, int64_t part) {
    return part + part_steps < steps ? part + part_steps : steps;
  }

  // ---- packing --------------------------------------------------------------------------------------------------

  static EPMQ_INLINE __m512 read(const epmq::PackArgs& a, int64_t m, int64_t column) {
    if (m >= a.kept) return _mm512_setzero_ps();
    const int64_t row = a.rows[m] * a.row_stride;
    if (a.column_stride == 1 && column + 16 <= a.columns) return read_vector(a.data, a.dtype, row + column).r;
    float lanes[16];
    for (int64_t l = 0; l < 16; l++)
      lanes[l] = column + l < a.columns ? read_element(a.data, a.dtype, row + (column + l) * a.column_stride) : 0.0f;
    return _mm512_loadu_ps(lanes);
  }

  // Magnitudes seen, as bits.
  struct Range {
    __m512i low, high;

    // Zero counts as the largest of the low ones.
    EPMQ_INLINE void see(__m512 value) {
      const __m512i one = _mm512_set1_epi32(1);
      const __m512i magnitude = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
      low = _mm512_min_epu32(low, _mm512_sub_epi32(magnitude, one));
      high = _mm512_max_epu32(high, magnitude);
    }
    bool ordinary() const {
      return _mm512_reduce_min_epu32(low) >= lowest - 1 && _mm512_reduce_max_epu32(high) <= highest;
    }
  };

  // The next part of 32 rows: 16 pairs of rows x 16 columns.
  static EPMQ_INLINE void take_pairs(__m512 (&values)[32], __m512i (&pairs)[16]) {
    EPMQ_UNROLL
    for (int p = 0; p < 16; p++) {
      const __m512i even = take_bfloat(values[2 * p]), odd = take_bfloat(values[2 * p + 1]);
      pairs[p] = _mm512_or_si512(even, _mm512_slli_epi32(odd, 16));
    }
  }

  static EPMQ_INLINE void store_pairs(const __m512i (&pairs)[16], uint16_t* out) {
    EPMQ_UNROLL
    for (int p = 0; p < 16; p++) _mm512_storeu_si512(out + p * kTileDepth, pairs[p]);
  }

  // Right operands are pairs of rows, [part][16 pairs][16 columns][2]; left ones columns, [part][16 columns][32 rows].
  template <bool Weighted>
  static EPMQ_INLINE void pack_tile(const epmq::TilePackArgs& a, int64_t t, int64_t step, __m512& sum, Range& range) {
    uint16_t* left = a.left + (t * a.steps + step) * a.left_parts * kTileWords;
    uint16_t* right = a.right ? a.right + (t * a.steps + step) * a.right_parts * kTileWords : nullptr;
    __m512 values[32], weighted[32];
    __m512i pairs[16];
    for (int64_t r = 0; r < kTileDepth; r++) {
      const int64_t m = step * kTileDepth + r;
      values[r] = read(a, m, t * 16);
      range.see(values[r]);
      if (Weighted) {
        weighted[r] = _mm512_mul_ps(values[r], _mm512_set1_ps(m < a.kept ? a.weights[m] : 0.0f));
        range.see(weighted[r]);
      }
      sum = _mm512_add_ps(sum, Weighted ? weighted[r] : values[r]);
    }
    for (int part = 0; part < a.left_parts; part++) {
      take_pairs(values, pairs);
      if (!Weighted && right) store_pairs(pairs, right + part * kTileWords);
      transpose(pairs);
      store_pairs(pairs, left + part * kTileWords);
    }
    for (int part = 0; Weighted && right && part < a.right_parts; part++) {
      take_pairs(weighted, pairs);
      store_pairs(pairs, right + part * kTileWords);
    }
  }

  template <bool Weighted>
  static void pack_tiles(const epmq::TilePackArgs& a, int64_t tile_begin, int64_t tile_end) {
    constexpr int64_t strip = 16;  // tiles that are walked together, so that rows are read a kilobyte at a time
    for (int64_t first = tile_begin; first < tile_end; first += strip) {
      const int64_t last = first + strip < tile_end ? first + strip : tile_end;
      Range range = {_mm512_set1_epi32(-1), _mm512_setzero_si512()};
      for (int64_t part = 0; part < a.steps; part += part_steps) {
        __m512 sums[strip];
        for (int64_t t = first; t < last; t++) sums[t - first] = _mm512_setzero_ps();
        for (int64_t step = part; step < part_end(a.steps, part); step++)
          for (int64_t t = first; t < last; t++) pack_tile<Weighted>(a, t, step, sums[t - first], range);
        for (int64_t t = first; t < last; t++) {
          float lanes[16];
          _mm512_storeu_ps(lanes, sums[t - first]);
          for (int64_t l = 0; l < 16 && t * 16 + l < a.columns; l++)
            if (a.sum.wide)
              a.sum.wide[t * 16 + l] += (double)lanes[l];
            else
              a.sum.narrow[t * 16 + l] += lanes[l];
        }
      }
      if (!range.ordinary()) __atomic_store_n(a.ordinary, (uint8_t)0, __ATOMIC_RELAXED);
    }
  }

  static void pack(const epmq::TilePackArgs& a, int64_t tile_begin, int64_t tile_end) {
    const auto tiles = a.weights ? pack_tiles<true> : pack_tiles<false>;
    tiles(a, tile_begin, tile_end);
  }

  // ---- sums -----------------------------------------------------------------------------------------------------

  static EPMQ_INLINE void add_wide(double* out, __mmask8 mask, __m256 sum) {
    _mm512_mask_storeu_pd(out, mask, _mm512_add_pd(_mm512_maskz_loadu_pd(mask, out), _mm512_cvtps_pd(sum)));
  }

  // out += sums [right][left][16][16], cut at the edges.
  static EPMQ_INLINE void add(const epmq::TileProductArgs& a, int64_t row, int64_t column, const float* sums) {
    for (int right = 0; right < 2; right++) {
      const int64_t first = column + right * 16, width = a.column_end - first;
      if (width <= 0) break;
      const __mmask16 mask = (__mmask16)(width < 16 ? (1u << width) - 1 : 0xffffu);
      for (int64_t r = 0; r < pair && row + r < a.row_end; r++) {
        const int64_t place = (row + r) * a.out_stride + first;
        const __m512 sum = _mm512_loadu_ps(sums + (right * pair + r) * 16);
        if (a.out.wide) {
          add_wide(a.out.wide + place, (__mmask8)mask, _mm512_castps512_ps256(sum));
          add_wide(a.out.wide + place + 8, (__mmask8)(mask >> 8), _mm512_extractf32x8_ps(sum, 1));
        } else {
          float* out = a.out.narrow + place;
          _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), sum));
        }
      }
    }
  }
};

}  // namespace

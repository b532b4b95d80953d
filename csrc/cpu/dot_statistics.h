// Products of packed columns of bf16 numbers by dot products of pairs (AVX512_BF16), in the layout of pair_packing.h.
// fp32 accumulators run over one part of a chunk; parts are added up before the chunk is added to the running sums.
#pragma once

#include "pair_packing.h"

namespace {

struct DotStatistics : PairPacking {
  static constexpr int64_t rows = 8;  // of the left operand at a time, against two vectors of the right one

  static void product(const epmq::TileProductArgs& a) {
    const int64_t tile = a.steps * kTileWords;
    alignas(64) float sums[2 * pair * 16];
    for (int64_t row = a.row_begin; row < a.row_end; row += pair)
      for (int64_t column = a.column_begin; column < a.column_end; column += pair) {
        if (a.triangle && column > row) break;
        for (int64_t r = 0; r < pair; r += rows) {
          const uint16_t* left = a.left + (row + r) / kTileRows * tile + r % kTileRows * kTileDepth;
          const uint16_t* right = a.right + column / kTileRows * tile;
          multiply<false>(part_end(a.steps, 0), left, right, tile, sums + r * 16);
          for (int64_t part = part_steps; part < a.steps; part += part_steps)
            multiply<true>(part_end(a.steps, part) - part, left + part * kTileWords, right + part * kTileWords, tile,
                           sums + r * 16);
        }
        add(a, row, column, sums);
      }
  }

  // Rows of sums [right][pair][16], written or added to.
  template <bool Add>
  static EPMQ_INLINE void multiply(int64_t steps, const uint16_t* left, const uint16_t* right, int64_t right_stride,
                                   float* sums) {
    __m512 acc[2][rows];
    EPMQ_UNROLL
    for (int64_t r = 0; r < rows; r++) acc[0][r] = acc[1][r] = _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; step++, left += kTileWords, right += kTileWords)
      for (int64_t p = 0; p < kTilePairs; p++) {
        const __m512bh first = (__m512bh)_mm512_loadu_si512(right + p * kTileDepth);
        const __m512bh second = (__m512bh)_mm512_loadu_si512(right + right_stride + p * kTileDepth);
        EPMQ_UNROLL
        for (int64_t r = 0; r < rows; r++) {
          int32_t two;
          memcpy(&two, left + r * kTileDepth + 2 * p, 4);
          const __m512bh one_row = (__m512bh)_mm512_set1_epi32(two);
          acc[0][r] = _mm512_dpbf16_ps(acc[0][r], one_row, first);
          acc[1][r] = _mm512_dpbf16_ps(acc[1][r], one_row, second);
        }
      }
    EPMQ_UNROLL
    for (int64_t r = 0; r < rows; r++) {
      float* const places[2] = {sums + r * 16, sums + (pair + r) * 16};
      EPMQ_UNROLL
      for (int v = 0; v < 2; v++)
        _mm512_storeu_ps(places[v], Add ? _mm512_add_ps(_mm512_loadu_ps(places[v]), acc[v][r]) : acc[v][r]);
    }
  }
};

}  // namespace

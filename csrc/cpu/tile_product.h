// out -= a * b on matrix tiles, with 16 significant bits of each factor: three products of bf16 parts, summed in fp32.
//
// A number is taken as the sum of its two largest bf16 parts, and of their products the smallest is left out: a term is
// off by at most 3 * 2^-16 of its size. Accumulators are read from and written to `out` itself. A row of `out` has the
// same bits whatever rows it is computed with.
#pragma once

#include "tiles.h"

namespace {

struct TileProduct {
  static constexpr int64_t pair = 2 * kTileRows;             // rows, and columns, of two operands
  static constexpr int parts = 2;
  static constexpr int64_t step_words = parts * kTileWords;  // of one operand: [part][16][32]

  static int64_t steps_of(const epmq::SubtractArgs& a) { return (a.depth + kTileDepth - 1) / kTileDepth; }
  // bf16 numbers of a packed operand of `count` rows or columns, in whole pairs of tiles.
  static int64_t words(const epmq::SubtractArgs& a, int64_t count) {
    return (count + pair - 1) / pair * 2 * steps_of(a) * step_words;
  }

  // ---- operands: [tile][step][part][16][32] ---------------------------------------------------------------------

  // 16 numbers that lie `stride` apart; zero from `count` on.
  static EPMQ_INLINE __m512 read(const float* at, int64_t stride, int64_t count) {
    if (count <= 0) return _mm512_setzero_ps();
    const __mmask16 mask = (__mmask16)(count < 16 ? (1u << count) - 1 : 0xffffu);
    if (stride == 1) return _mm512_maskz_loadu_ps(mask, at);
    float lanes[16] = {};
    for (int64_t l = 0; l < (count < 16 ? count : 16); l++) lanes[l] = at[l * stride];
    return _mm512_loadu_ps(lanes);
  }

  // Left tiles hold -a, row by row.
  static void pack_left(const epmq::SubtractArgs& a, int64_t tile_begin, int64_t tile_end) {
    const __m512 minus = _mm512_set1_ps(-0.0f);
    for (int64_t t = tile_begin; t < tile_end; t++)
      for (int64_t step = 0; step < steps_of(a); step++) {
        uint16_t* out = a.left + (t * steps_of(a) + step) * step_words;
        for (int64_t r = 0; r < kTileRows; r++) {
          const int64_t row = t * kTileRows + r, k = step * kTileDepth, left = row < a.rows ? a.depth - k : 0;
          const float* from = a.a + row * a.a_row_stride + k * a.a_column_stride;
          __m512 values[2] = {read(from, a.a_column_stride, left),
                              read(from + 16 * a.a_column_stride, a.a_column_stride, left - 16)};
          for (__m512& value : values) value = _mm512_xor_ps(value, minus);
          for (int part = 0; part < parts; part++)
            _mm512_storeu_si512(out + part * kTileWords + r * kTileDepth, take_words(values[0], values[1]));
        }
      }
  }

  // Right tiles hold pairs of rows of b: [16 pairs][16 columns][2].
  static void pack_right(const epmq::SubtractArgs& a, int64_t tile_begin, int64_t tile_end) {
    for (int64_t t = tile_begin; t < tile_end; t++)
      for (int64_t step = 0; step < steps_of(a); step++) {
        uint16_t* out = a.right + (t * steps_of(a) + step) * step_words;
        const int64_t k = step * kTileDepth, column = t * kTileRows;
        const float* from = a.b + k * a.b_row_stride + column * a.b_column_stride;
        if (a.b_row_stride == 1)
          pack_columns(a, from, a.depth - k, a.columns - column, out);
        else
          pack_pairs(a, from, a.depth - k, a.columns - column, out);
      }
  }

  static EPMQ_INLINE void pack_pairs(const epmq::SubtractArgs& a, const float* from, int64_t depth, int64_t columns,
                                     uint16_t* out) {
    for (int64_t p = 0; p < kTilePairs; p++) {
      __m512 even = read(from + 2 * p * a.b_row_stride, a.b_column_stride, 2 * p < depth ? columns : 0);
      __m512 odd = read(from + (2 * p + 1) * a.b_row_stride, a.b_column_stride, 2 * p + 1 < depth ? columns : 0);
      for (int part = 0; part < parts; part++)
        _mm512_storeu_si512(out + part * kTileWords + p * kTileDepth,
                            _mm512_or_si512(take_bfloat(even), _mm512_slli_epi32(take_bfloat(odd), 16)));
    }
  }

  static EPMQ_INLINE void pack_columns(const epmq::SubtractArgs& a, const float* from, int64_t depth, int64_t columns,
                                       uint16_t* out) {
    __m512i words[parts][16];
    for (int64_t c = 0; c < kTileRows; c++) {
      const float* column = from + c * a.b_column_stride;
      const int64_t count = c < columns ? depth : 0;
      __m512 values[2] = {read(column, 1, count), read(column + 16, 1, count - 16)};
      for (int part = 0; part < parts; part++) words[part][c] = take_words(values[0], values[1]);
    }
    for (int part = 0; part < parts; part++) {
      transpose(words[part]);
      for (int64_t p = 0; p < kTilePairs; p++)
        _mm512_storeu_si512(out + part * kTileWords + p * kTileDepth, words[part][p]);
    }
  }

  // ---- product --------------------------------------------------------------------------------------------------

  static EPMQ_INLINE void load_sums(const float* sums, int64_t stride) {
    _tile_loadd(0, sums, 4 * stride);
    _tile_loadd(1, sums + kTileRows * stride, 4 * stride);
    _tile_loadd(2, sums + kTileRows, 4 * stride);
    _tile_loadd(3, sums + kTileRows * stride + kTileRows, 4 * stride);
  }

  static EPMQ_INLINE void store_sums(float* sums, int64_t stride) {
    _tile_stored(0, sums, 4 * stride);
    _tile_stored(1, sums + kTileRows * stride, 4 * stride);
    _tile_stored(2, sums + kTileRows, 4 * stride);
    _tile_stored(3, sums + kTileRows * stride + kTileRows, 4 * stride);
  }

  // Pairs of row tiles [begin, end) against all columns.
  static void run(const epmq::SubtractArgs& a, int64_t pair_begin, int64_t pair_end) {
    constexpr int64_t strip = 512;  // columns whose packed numbers stay in the second cache
    const TileScope scope(16);
    const int64_t tile = steps_of(a) * step_words;
    for (int64_t first = 0; first < a.columns; first += strip) {
      const int64_t last = first + strip < a.columns ? first + strip : a.columns;
      for (int64_t p = pair_begin; p < pair_end; p++)
        for (int64_t column = first; column < last; column += pair) {
          const int64_t row = p * pair;
          const int64_t rows = a.rows - row < pair ? a.rows - row : pair;
          const int64_t columns = last - column < pair ? last - column : pair;
          float* out = a.out + row * a.out_stride + column;
          const uint16_t* left = a.left + row / kTileRows * tile;
          const uint16_t* right = a.right + column / kTileRows * tile;
          alignas(64) float edge[pair * pair];
          const bool whole = rows == pair && columns == pair;
          float* sums = whole ? out : edge;
          const int64_t stride = whole ? a.out_stride : pair;
          for (int64_t r = 0; !whole && r < rows; r++)
            memcpy(edge + r * pair, out + r * a.out_stride, sizeof(float) * (size_t)columns);
          settle();
          load_sums(sums, stride);
          for (int64_t step = 0; step < steps_of(a); step++, left += step_words, right += step_words) {
            load_left(left, tile);
            load_right(right + kTileWords, tile);
            multiply_loaded();
            load_right(right, tile);
            multiply_loaded();
            load_left(left + kTileWords, tile);
            multiply_loaded();
          }
          store_sums(sums, stride);
          settle();
          for (int64_t r = 0; !whole && r < rows; r++)
            memcpy(out + r * a.out_stride, edge + r * pair, sizeof(float) * (size_t)columns);
        }
    }
  }
};

}  // namespace

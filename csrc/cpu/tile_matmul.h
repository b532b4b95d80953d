// y = x * dequant(W)^T + bias on matrix tiles, with one order of summation whatever the batch.
//
// A row of W is cut into segments of at most 128 codes, all of one group. q - z is exact in bf16 and x is an exact sum
// of one (bf16), two (fp16) or three (fp32) bf16 parts, so a segment's products are exact; a tile sums them in fp32
// (tiles.h), and one fused multiply-add per segment scales the sum and adds it to the output of that part. The parts
// are added last, smallest first. Every (row of x, part) is a column of its own and no step mixes columns, so a row's
// result has the same bits alone and in a batch.
#pragma once

#include "code_words.h"
#include "tiles.h"

namespace {

struct TileMatmul : CodeWords {
  static constexpr int64_t block_words = unit_steps * kTileWords;  // of 16 weight rows
  static constexpr int64_t panel_rows = 32;   // weight rows of two left operands: decoded together, used at once
  static constexpr int64_t batch_tiles = 8;  // column tiles that share them, and stay in the second cache

  // All parts of a small batch share one column tile.
  static bool shared(const epmq::WordMatmulArgs& a) { return a.parts * a.m <= kTileRows; }

  static void shape(epmq::WordMatmulArgs& a) {
    a.parts = parts_of(a.x_dtype);
    a.width = shared(a) ? a.parts * a.m : a.m < kTileRows ? a.m : kTileRows;
    a.tiles = shared(a) ? 1 : (a.m + kTileRows - 1) / kTileRows * a.parts;
  }

  static int64_t tile_words(const epmq::WordMatmulArgs& a) { return units_of(a) * unit * a.width; }
  static int64_t column_words(const epmq::WordMatmulArgs& a) { return a.tiles * tile_words(a); }

  struct Place {
    int64_t tile, column;
  };

  static Place place_of(const epmq::WordMatmulArgs& a, int64_t m, int part) {
    if (shared(a)) return {0, part * a.m + m};
    return {m / kTileRows * a.parts + part, m % kTileRows};
  }

  // ---- activations ----------------------------------------------------------------------------------------------

  template <bool Long>
  static void prepare_units(const epmq::WordMatmulArgs& a, int64_t unit_begin, int64_t unit_end) {
    for (int64_t u = unit_begin; u < unit_end; u++)
      for (int64_t m = 0; m < a.m; m++) {
        __m512 values[8];
        read_unit(a, m, u * unit, values);
        bool ordinary = true;
        for (int i = 0; i < 8; i++) ordinary = ordinary && all_between(values[i], lowest, highest);
        if (!ordinary) __atomic_store_n(a.ordinary + m, (uint8_t)0, __ATOMIC_RELAXED);
        for (int part = 0; part < a.parts; part++) {
          __m512i words[4], steps[4];
          for (int i = 0; i < 4; i++) words[i] = take_words(values[2 * i], values[2 * i + 1]);
          order<Long>(words, steps);
          const Place place = place_of(a, m, part);
          uint16_t* out = a.columns + place.tile * tile_words(a) + u * unit * a.width + 2 * place.column;
          for (int j = 0; j < 4; j++) {
            uint32_t pairs[16];
            _mm512_storeu_si512(pairs, steps[j]);
            for (int p = 0; p < 16; p++, out += 2 * a.width) memcpy(out, pairs + p, 4);
          }
        }
      }
  }

  static void prepare(const epmq::WordMatmulArgs& a, int64_t unit_begin, int64_t unit_end) {
    const auto units = segment_of(a) == unit_steps ? prepare_units<true> : prepare_units<false>;
    units(a, unit_begin, unit_end);
  }

  // ---- weights --------------------------------------------------------------------------------------------------

  struct Work {
    int32_t* groups;     // [segments]: the group of each
    float* scales;       // [2][G][16]
    float* sums;         // [2][batch tiles][16][width]
    float* products;     // [2][2][16][width]
    uint16_t* weights;   // [2][steps of a unit][16][32]
    int64_t bytes;       // of all of these
  };

  static Work work_of(const epmq::WordMatmulArgs& a, void* scratch) {
    const int64_t tile = kTileRows * a.width;
    const int64_t batch = a.tiles < batch_tiles ? a.tiles : batch_tiles;
    Scratch take{(char*)scratch};
    Work work;
    work.weights = (uint16_t*)take(2 * block_words * 2);
    work.products = (float*)take(4 * tile * 4);
    work.sums = (float*)take(2 * batch * tile * 4);
    work.scales = (float*)take(2 * a.groups * kTileRows * 4);
    work.groups = (int32_t*)take(units_of(a) * unit_steps * 4);
    work.bytes = take.at - (char*)scratch;
    return work;
  }

  static int64_t scratch(const epmq::WordMatmulArgs& a) { return work_of(a, nullptr).bytes; }

  // Scales of 16 weight rows, one vector per group; rows past the end repeat the last.
  static void read_scales(const epmq::MatmulArgs& a, int64_t row, float* out) {
    for (int64_t g = 0; g < a.groups; g += 16) {
      const int64_t count = a.groups - g < 16 ? a.groups - g : 16;
      const __mmask16 mask = (__mmask16)((1u << count) - 1);
      __m512i v[16];
      for (int r = 0; r < 16; r++) {
        const int64_t at = (row + r < a.n ? row + r : a.n - 1) * a.scale_stride + g;
        if (a.scale_dtype == epmq::Dtype::kFloat) {
          v[r] = _mm512_maskz_loadu_epi32(mask, (const float*)a.scales + at);
        } else {
          const __m256i words = _mm256_maskz_loadu_epi16(mask, (const uint16_t*)a.scales + at);
          v[r] = a.scale_dtype == epmq::Dtype::kHalf ? _mm512_castps_si512(_mm512_cvtph_ps(words))
                                                     : _mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16);
        }
      }
      transpose(v);
      for (int64_t i = 0; i < count; i++) _mm512_storeu_si512(out + (g + i) * 16, v[i]);
    }
  }

  // Towards the second cache: the grids of `rows` weight rows, spread evenly over the units of the rows before.
  struct GridFetch {
    struct Lines {
      const char* at;
      int64_t count, due;

      Lines(const void* grids, int64_t row_bytes, int64_t row, int64_t rows)
          : at((const char*)grids + row * row_bytes), count((rows * row_bytes + 63) / 64), due(0) {}
      EPMQ_INLINE void step(int64_t units) {
        for (due += count; due >= units; due -= units, at += 64) __builtin_prefetch(at, 0, 2);
      }
    };
    int64_t units;
    Lines scales, zeros;  // no lines where there are no zeros: their stride is 0

    GridFetch(const epmq::WordMatmulArgs& a, int64_t row, int64_t rows)
        : units(units_of(a)),
          scales(a.scales, a.scale_stride * (a.scale_dtype == epmq::Dtype::kFloat ? 4 : 2), row, rows),
          zeros(a.zeros, a.zero_stride, row, rows) {}
    EPMQ_INLINE void step() {
      scales.step(units);
      zeros.step(units);
    }
  };

  // Unit u of 16 weight rows: [step][row][32]. A line of `ahead` is fetched for each of codes.
  template <bool Long, bool Symmetric>
  static EPMQ_INLINE void decode(const epmq::WordMatmulArgs& a, int64_t row, int64_t u, const int32_t* segment_groups,
                                 const uint8_t* ahead, uint16_t* out) {
    const int64_t segment = segment_of(a);
    const int64_t rows = a.n - row < kTileRows ? a.n - row : kTileRows;
    if (rows < kTileRows) memset(out, 0, sizeof(uint16_t) * (size_t)block_words);
    const int32_t* groups = segment_groups + u * (unit_steps / segment);
    const uint8_t* codes = a.packed + row * a.row_bytes + u * (unit / 2);
    if ((u + 1) * unit > a.k) {
      for (int64_t r = 0; r < rows; r++)
        decode_end<Long, Symmetric>(a, row + r, u * unit, kTileWords, out + r * kTileDepth);
      return;
    }
    for (int64_t r = 0; r < rows; r++, ahead += 64) {
      __builtin_prefetch(ahead, 0, 2);
      __m512i words[4];
      unit_words<Long, Symmetric>(a, row + r, groups, segment, codes, words);
      EPMQ_UNROLL
      for (int j = 0; j < 4; j++) _mm512_storeu_si512(out + r * kTileDepth + j * kTileWords, words[j]);
      codes += a.row_bytes;
    }
  }

  // ---- sums -----------------------------------------------------------------------------------------------------

  // The weight row of each element of a tile [16][width], a vector at a time; a full tile does without.
  struct Owners {
    __m512i rows[15];

    explicit Owners(int64_t width) {
      for (int v = 0; v < 15; v++) {
        int32_t owner[16];
        for (int l = 0; l < 16; l++) owner[l] = (int32_t)((16 * v + l) / width);
        rows[v] = _mm512_loadu_si512(owner);
      }
    }
  };

  // sums += scales * products, one tile [16][width]; `rows` are its owners.
  static EPMQ_INLINE void scale(int64_t width, const __m512i* rows, const float* scales, const float* products,
                                float* sums) {
    if (width == 16) {
      EPMQ_UNROLL
      for (int n = 0; n < 16; n++) {
        const __m512 sum = _mm512_fmadd_ps(_mm512_set1_ps(scales[n]), _mm512_loadu_ps(products + 16 * n),
                                           _mm512_loadu_ps(sums + 16 * n));
        _mm512_storeu_ps(sums + 16 * n, sum);
      }
      return;
    }
    const __m512 all = _mm512_loadu_ps(scales);
    for (int64_t v = 0; v < width; v++) {
      const __m512 sum = _mm512_fmadd_ps(_mm512_permutexvar_ps(rows[v], all), _mm512_loadu_ps(products + 16 * v),
                                         _mm512_loadu_ps(sums + 16 * v));
      _mm512_storeu_ps(sums + 16 * v, sum);
    }
  }

  // The segments of unit u of one pair of weight blocks against Right column tiles.
  template <int Right, bool Long>
  static EPMQ_INLINE void multiply(const epmq::WordMatmulArgs& a, int64_t u, int64_t tile, const Work& work,
                                   const __m512i* rows, float* sums, int64_t block_sums) {
    const int64_t steps = Long ? unit_steps : segment_of(a), size = kTileRows * a.width;
    const uint16_t* columns = a.columns + tile * tile_words(a) + u * unit * a.width;
    const int32_t* groups = work.groups + u * unit_steps / steps;
    for (int64_t s = 0; s < unit_steps; s += steps, groups++) {
      clear_tiles<Right>();
      multiply_tiles<Right>(steps, work.weights + s * kTileWords, block_words, columns + s * kTileDepth * a.width,
                            tile_words(a), a.width);
      store_tiles<Right>(work.products, a.width);
      for (int right = 0; right < Right; right++)
        for (int left = 0; left < 2; left++)
          scale(a.width, rows, work.scales + (left * a.groups + *groups) * kTileRows,
                work.products + (2 * right + left) * size, sums + left * block_sums + right * size);
    }
  }

  // ---- results --------------------------------------------------------------------------------------------------

  // Parts are added, smallest first, and 16 weight rows of each row of x are written.
  static void finish(const epmq::WordMatmulArgs& a, int64_t row, int64_t first_tile, int64_t m_begin, int64_t m_end,
                     const float* sums) {
    const int64_t rows = a.n - row < kTileRows ? a.n - row : kTileRows;
    const __mmask16 mask = (__mmask16)((1u << rows) - 1);
    const __m512 bias = a.bias ? _mm512_maskz_loadu_ps(mask, a.bias + row) : _mm512_setzero_ps();
    const __m512i lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                             _mm512_set1_epi32((int)a.width));
    for (int64_t m = m_begin; m < m_end; m++) {
      __m512 y = _mm512_setzero_ps();
      for (int part = a.parts - 1; part >= 0; part--) {
        const Place place = place_of(a, m, part);
        const float* from = sums + (place.tile - first_tile) * kTileRows * a.width + place.column;
        y = _mm512_add_ps(y, _mm512_i32gather_ps(lanes, from, 4));
      }
      write(a, m * a.n + row, mask, a.bias ? _mm512_add_ps(y, bias) : y);
    }
  }

  // A unit of a pair of weight blocks is decoded and multiplied while codes and grids of the rows that come next are on
  // their way, in the order of memory, which alone decides the time of a small batch.
  template <bool Long, bool Symmetric>
  static void panels(const epmq::WordMatmulArgs& a, int64_t row_begin, int64_t row_end, void* scratch) {
    const Work work = work_of(a, scratch);
    const int64_t units = units_of(a), batch = batch_tiles / a.parts * a.parts, tile = kTileRows * a.width;
    groups_of(a, work.groups);
    const Owners owners(a.width);
    const TileScope scope(a.width);
    for (int64_t first = 0; first < a.tiles; first += batch) {
      const int64_t count = a.tiles - first < batch ? a.tiles - first : batch;
      const int64_t m_begin = first / a.parts * kTileRows;
      const int64_t m_end = first + count == a.tiles ? a.m : m_begin + count / a.parts * kTileRows;
      for (int64_t row = row_begin; row < row_end; row += panel_rows) {
        for (int64_t b = 0; b < 2; b++) read_scales(a, row + b * kTileRows, work.scales + b * a.groups * kTileRows);
        memset(work.sums, 0, sizeof(float) * (size_t)(2 * count * tile));
        GridFetch grids(a, row + panel_rows, panel_rows);
        const uint8_t* next = a.packed + (row + panel_rows) * a.row_bytes;
        for (int64_t u = 0; u < units; u++) {
          grids.step();
          for (int64_t b = 0; b < 2; b++, next += kTileRows * (unit / 2))
            decode<Long, Symmetric>(a, row + b * kTileRows, u, work.groups, next, work.weights + b * block_words);
          int64_t t = 0;
          for (; t + 2 <= count; t += 2)
            multiply<2, Long>(a, u, first + t, work, owners.rows, work.sums + t * tile, count * tile);
          if (t < count) multiply<1, Long>(a, u, first + t, work, owners.rows, work.sums + t * tile, count * tile);
        }
        for (int64_t b = 0; b < 2 && row + b * kTileRows < row_end; b++)
          finish(a, row + b * kTileRows, first, m_begin, m_end, work.sums + b * count * tile);
      }
    }
  }

  static void run(const epmq::WordMatmulArgs& a, int64_t row_begin, int64_t row_end, void* scratch) {
    const bool whole = segment_of(a) == unit_steps;
    const auto zeros = whole ? panels<true, false> : panels<false, false>;
    const auto symmetric = whole ? panels<true, true> : panels<false, true>;
    return a.zeros ? zeros(a, row_begin, row_end, scratch) : symmetric(a, row_begin, row_end, scratch);
  }
};

}  // namespace

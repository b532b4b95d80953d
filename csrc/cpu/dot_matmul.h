// y = x * dequant(W)^T + bias for bf16 x, by dot products of pairs of bf16 numbers (AVX512_BF16), with one order of
// summation whatever the batch.
//
// q - z is exact in bf16, so products are. Every output is 16 partial sums, lane l taking the l-th pair of each step of
// 32 codes; the steps of a segment are summed from zero, and one fused multiply-add scales that sum and adds it to the
// lanes' totals. After a pass over `pass_units` units one fixed tree adds the lanes; passes are added in order.
//   few rows of x    weights go from codes to registers and are used at once (bound by memory);
//   more rows        a few rows of weights are decoded for a pass, stay in the first cache and meet all rows of x.
#pragma once

#include "code_words.h"
#include "decode.h"

namespace {

struct DotMatmul : CodeWords {
  static constexpr int RM = 4, RN = 3;           // rows of x, rows of W: sums and totals fill the registers
  static constexpr int64_t pass_units = 8, pass_words = pass_units * unit;
  static constexpr int most_few = 6;             // rows of x that weights are not kept for
  static constexpr int64_t few_rows = 16;        // weight rows whose results are written together
  static constexpr int64_t sub_rows = 4 * RN;    // weight rows decoded together for more
  static constexpr int64_t batch_rows = 512;     // rows of x that meet them: those of a pass stay in the second cache
  static constexpr int64_t panel_rows = 96;      // weight rows per task
  static_assert(panel_rows % few_rows == 0 && panel_rows % sub_rows == 0 && batch_rows % RM == 0,
                "tiles must fill panels");
  static_assert(RN * RM <= 16 && sub_rows <= 16, "totals of a tile, and its rows, are one vector");

  static bool takes(const epmq::MatmulArgs& a) {
    return a.x_dtype == epmq::Dtype::kBfloat && CodeWords::takes(a);
  }

  static void shape(epmq::WordMatmulArgs& a) {
    a.parts = 1;
    a.width = 1;
    a.tiles = a.m;  // a row each
  }

  // Prepared x: [pass][row][words of a pass].
  static int64_t column_words(const epmq::WordMatmulArgs& a) {
    return (units_of(a) + pass_units - 1) / pass_units * a.m * pass_words;
  }
  static const uint16_t* x_of(const epmq::WordMatmulArgs& a, int64_t m, int64_t first_unit) {
    return a.columns + (first_unit / pass_units * a.m + m) * pass_words;
  }

  static int64_t x_tiles(const epmq::MatmulArgs& a) { return ((a.m < batch_rows ? a.m : batch_rows) + RM - 1) / RM; }

  static EPMQ_INLINE __m512 dot(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }

  // Lane i of the result is the total of v[i]: the same tree for every vector. Count: 4, 8 or 16.
  template <int Count>
  static EPMQ_INLINE __m512 lane_totals(const __m512 (&v)[Count]) {
    __m512 t[Count / 2], u[Count / 4], w[2];
    EPMQ_UNROLL
    for (int i = 0; i < Count / 2; i++)
      t[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    EPMQ_UNROLL
    for (int i = 0; i < Count / 4; i++) {
      const __m512d a = _mm512_castps_pd(t[2 * i]), b = _mm512_castps_pd(t[2 * i + 1]);
      u[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    EPMQ_UNROLL
    for (int i = 0; i < 2; i++) {
      constexpr int last = Count / 4 - 1;
      const __m512 a = u[2 * i < last ? 2 * i : last], b = u[2 * i + 1 < last ? 2 * i + 1 : last];
      w[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    }
    return _mm512_add_ps(_mm512_shuffle_f32x4(w[0], w[1], 0x88), _mm512_shuffle_f32x4(w[0], w[1], 0xdd));
  }

  // ---- activations ----------------------------------------------------------------------------------------------

  template <bool Long>
  static void prepare_units(const epmq::WordMatmulArgs& a, int64_t unit_begin, int64_t unit_end) {
    for (int64_t m = 0; m < a.m; m++)
      for (int64_t u = unit_begin; u < unit_end; u++) {
        __m512 values[8];
        read_unit(a, m, u * unit, values);
        bool ordinary = true;
        for (int i = 0; i < 8; i++) ordinary = ordinary && all_between(values[i], lowest, highest);
        if (!ordinary) __atomic_store_n(a.ordinary + m, (uint8_t)0, __ATOMIC_RELAXED);
        __m512i words[4], steps[4];
        for (int i = 0; i < 4; i++) words[i] = take_words(values[2 * i], values[2 * i + 1]);
        order<Long>(words, steps);
        uint16_t* out = a.columns + (u / pass_units * a.m + m) * pass_words + u % pass_units * unit;
        for (int j = 0; j < 4; j++) _mm512_storeu_si512(out + j * step, steps[j]);
      }
  }

  static void prepare(const epmq::WordMatmulArgs& a, int64_t unit_begin, int64_t unit_end) {
    const auto units = segment_of(a) == unit_steps ? prepare_units<true> : prepare_units<false>;
    units(a, unit_begin, unit_end);
  }

  // ---- memory of a thread ---------------------------------------------------------------------------------------

  struct Work {
    int32_t* groups;     // [segments]: the group of each
    float* converted;    // [sub_rows][G] scales in fp32
    float* scales;       // [sub_rows / RN][segments of a pass][RN]
    float* sums;         // [tiles of x][tiles of W][RN][RM] and four more
    uint16_t* weights;   // [sub_rows / RN][steps of a pass][RN][32]
    int64_t bytes;       // of all of these
  };

  static Work work_of(const epmq::WordMatmulArgs& a, void* scratch) {
    Scratch take{(char*)scratch};
    Work work;
    work.weights = (uint16_t*)take(sub_rows * pass_units * unit * 2);
    work.sums = (float*)take(x_tiles(a) * (sub_rows / RN) * 16 * 4);
    work.scales = (float*)take(sub_rows * pass_units * unit_steps * 4);
    work.converted = (float*)take(sub_rows * a.groups * 4);
    work.groups = (int32_t*)take(units_of(a) * unit_steps * 4);
    work.bytes = take.at - (char*)scratch;
    return work;
  }

  static int64_t scratch(const epmq::WordMatmulArgs& a) { return work_of(a, nullptr).bytes; }

  // ---- few rows of x --------------------------------------------------------------------------------------------

  // Units [from, to) of a weight row against M rows of x: results[m] += w * x[m]. Codes are read in the order of
  // memory, and those of the rows after next are fetched.
  template <bool Long, bool Symmetric, int M>
  static EPMQ_INLINE void few_pass(const epmq::WordMatmulArgs& a, int64_t row, int64_t from, int64_t to,
                                   const int32_t* all_groups, const float* scales, __m512& results) {
    static_assert(M <= most_few && most_few <= 8);
    constexpr int padded = M <= 4 ? 4 : 8;
    const int64_t segment = Long ? unit_steps : segment_of(a), segments = unit_steps / segment;
    const uint8_t* codes = a.packed + row * a.row_bytes + from * (unit / 2);
    const int32_t* groups = all_groups + from * segments;
    const uint16_t* x = x_of(a, 0, from);
    __m512 totals[padded];
    EPMQ_UNROLL
    for (int m = 0; m < padded; m++) totals[m] = _mm512_setzero_ps();
    for (int64_t u = from; u < to; u++, x += unit, codes += unit / 2, groups += segments) {
      __m512i w[4];
      if ((u + 1) * unit <= a.k) {
        __builtin_prefetch(codes + 2 * a.row_bytes);
        unit_words<Long, Symmetric>(a, row, groups, segment, codes, w);
      } else {
        uint16_t words[unit];
        decode_end<Long, Symmetric>(a, row, u * unit, step, words);
        for (int j = 0; j < 4; j++) w[j] = _mm512_loadu_si512(words + j * step);
      }
      __m512 sums[M];
      EPMQ_UNROLL
      for (int j = 0; j < 4; j++) {
        EPMQ_UNROLL
        for (int m = 0; m < M; m++) {
          if (Long ? j == 0 : j % segment == 0) sums[m] = _mm512_setzero_ps();
          sums[m] = dot(sums[m], w[j], _mm512_loadu_si512(x + m * pass_words + j * step));
        }
        if (Long ? j == 3 : (j + 1) % segment == 0) {
          const __m512 scale = _mm512_set1_ps(scales[groups[j / segment]]);
          EPMQ_UNROLL
          for (int m = 0; m < M; m++) totals[m] = _mm512_fmadd_ps(sums[m], scale, totals[m]);
        }
      }
    }
    results = _mm512_add_ps(results, lane_totals<padded>(totals));
  }

  template <bool Long, bool Symmetric, int M>
  static void few(const epmq::WordMatmulArgs& a, int64_t row_begin, int64_t row_end, const Work& work) {
    const int64_t units = units_of(a);
    const uint8_t unused = 0;
    for (int64_t first = row_begin; first < row_end; first += few_rows) {
      const int64_t rows = row_end - first < few_rows ? row_end - first : few_rows;
      float sums[few_rows * most_few];
      for (int64_t r = 0; r < rows; r++) {
        const float* scales = grid_of(a, first + r, work.converted, &unused).scales;
        __m512 results = _mm512_setzero_ps();
        for (int64_t from = 0; from < units; from += pass_units)
          few_pass<Long, Symmetric, M>(a, first + r, from, from + pass_units < units ? from + pass_units : units,
                                       work.groups, scales, results);
        float one_row[16];
        _mm512_storeu_ps(one_row, results);
        for (int m = 0; m < M; m++) sums[m * few_rows + r] = one_row[m];
      }
      const __mmask16 mask = (__mmask16)((1u << rows) - 1);
      const __m512 bias = a.bias ? _mm512_maskz_loadu_ps(mask, a.bias + first) : _mm512_setzero_ps();
      for (int m = 0; m < M; m++) {
        const __m512 y = _mm512_maskz_loadu_ps(mask, sums + m * few_rows);
        write(a, m * a.n + first, mask, a.bias ? _mm512_add_ps(y, bias) : y);
      }
    }
  }

  // ---- many rows of x -------------------------------------------------------------------------------------------

  // Units [from, to) of `rows` weight rows and the scales of their segments; rows past the end are zero.
  template <bool Long, bool Symmetric>
  static void decode(const epmq::WordMatmulArgs& a, int64_t row, int64_t rows, int64_t from, int64_t to,
                     const RowGrid* grids, const Work& work) {
    const int64_t segment = segment_of(a), segments = unit_steps / segment, steps = (to - from) * unit_steps;
    for (int64_t r = 0; r < (rows + RN - 1) / RN * RN; r++) {
      uint16_t* out = work.weights + (r / RN * steps * RN + r % RN) * step;
      float* scales = work.scales + r / RN * (to - from) * segments * RN + r % RN;
      const uint8_t* codes = a.packed + (row + r) * a.row_bytes;
      for (int64_t u = from; u < to; u++, out += unit_steps * RN * step) {
        const int32_t* groups = work.groups + u * segments;
        if (r < rows && (u + 1) * unit > a.k) {
          decode_end<Long, Symmetric>(a, row + r, u * unit, RN * step, out);
        } else {
          __m512i words[4] = {};
          if (r < rows) {
            __builtin_prefetch(codes + (u + pass_units) * (unit / 2));
            unit_words<Long, Symmetric>(a, row + r, groups, segment, codes + u * (unit / 2), words);
          }
          EPMQ_UNROLL
          for (int j = 0; j < 4; j++) _mm512_storeu_si512(out + j * RN * step, words[j]);
        }
        for (int64_t s = 0; s < segments; s++, scales += RN) *scales = r < rows ? grids[r].scales[groups[s]] : 0.0f;
      }
    }
  }

  // sums[n][m], 16 floats, += x tile * weight tile over `units`.
  template <bool Long, int M>
  static void tile(int64_t units, int64_t segment, const uint16_t* x, const uint16_t* w, const float* scales,
                   float* sums) {
    const int64_t steps = Long ? unit_steps : segment;
    __m512 totals[16];  // [RN][RM], and what fills the tree
    EPMQ_UNROLL
    for (int i = 0; i < 16; i++) totals[i] = _mm512_setzero_ps();
    for (int64_t s = 0; s < units * unit_steps; s += steps, scales += RN) {
      __m512 acc[RN][M];
      EPMQ_UNROLL
      for (int n = 0; n < RN; n++)
        EPMQ_UNROLL
        for (int m = 0; m < M; m++) acc[n][m] = _mm512_setzero_ps();
      for (int64_t j = 0; j < steps; j++, w += RN * step, x += step) {
        __m512i b[RN];
        EPMQ_UNROLL
        for (int n = 0; n < RN; n++) b[n] = _mm512_loadu_si512(w + n * step);
        EPMQ_UNROLL
        for (int m = 0; m < M; m++) {
          const __m512i v = _mm512_loadu_si512(x + m * pass_words);
          EPMQ_UNROLL
          for (int n = 0; n < RN; n++) acc[n][m] = dot(acc[n][m], b[n], v);
        }
      }
      EPMQ_UNROLL
      for (int n = 0; n < RN; n++)
        EPMQ_UNROLL
        for (int m = 0; m < M; m++)
          totals[n * RM + m] = _mm512_fmadd_ps(acc[n][m], _mm512_set1_ps(scales[n]), totals[n * RM + m]);
    }
    _mm512_storeu_ps(sums, _mm512_add_ps(_mm512_loadu_ps(sums), lane_totals<16>(totals)));
  }

  template <bool Long>
  static void tile_any(int64_t count, int64_t units, int64_t segment, const uint16_t* x, const uint16_t* w,
                       const float* scales, float* sums) {
    switch (count) {
      case 4: return tile<Long, 4>(units, segment, x, w, scales, sums);
      case 3: return tile<Long, 3>(units, segment, x, w, scales, sums);
      case 2: return tile<Long, 2>(units, segment, x, w, scales, sums);
      default: return tile<Long, 1>(units, segment, x, w, scales, sums);
    }
  }

  // Rows [first, last) of x.
  template <bool Long, bool Symmetric>
  static void many(const epmq::WordMatmulArgs& a, int64_t first, int64_t last, int64_t row_begin, int64_t row_end,
                   const Work& work) {
    constexpr int64_t tiles = sub_rows / RN;
    const int64_t units = units_of(a), segment = segment_of(a), segments = unit_steps / segment;
    const uint8_t unused = 0;
    int32_t places[16] = {};  // of the weight rows in sums
    for (int r = 0; r < sub_rows; r++) places[r] = r / RN * 16 + r % RN * RM;
    const __m512i lanes = _mm512_loadu_si512(places);
    for (int64_t row = row_begin; row < row_end; row += sub_rows) {
      const int64_t rows = row_end - row < sub_rows ? row_end - row : sub_rows;
      memset(work.sums, 0, sizeof(float) * (size_t)(x_tiles(a) * tiles * 16));
      RowGrid grids[sub_rows];
      for (int64_t r = 0; r < rows; r++) grids[r] = grid_of(a, row + r, work.converted + r * a.groups, &unused);
      for (int64_t from = 0; from < units; from += pass_units) {
        const int64_t to = from + pass_units < units ? from + pass_units : units;
        decode<Long, Symmetric>(a, row, rows, from, to, grids, work);
        for (int64_t m = first; m < last; m += RM)
          for (int64_t n = 0; n < rows; n += RN)
            tile_any<Long>(last - m < RM ? last - m : RM, to - from, segment, x_of(a, m, from),
                           work.weights + n * (to - from) * unit, work.scales + n * (to - from) * segments,
                           work.sums + ((m - first) / RM * tiles + n / RN) * 16);
      }
      const __mmask16 mask = (__mmask16)((1u << rows) - 1);
      const __m512 bias = a.bias ? _mm512_maskz_loadu_ps(mask, a.bias + row) : _mm512_setzero_ps();
      for (int64_t m = first; m < last; m++) {
        const float* from = work.sums + (m - first) / RM * tiles * 16 + m % RM;
        const __m512 y = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, lanes, from, 4);
        write(a, m * a.n + row, mask, a.bias ? _mm512_add_ps(y, bias) : y);
      }
    }
  }

  template <bool Long, bool Symmetric>
  static void panels(const epmq::WordMatmulArgs& a, int64_t row_begin, int64_t row_end, const Work& work) {
    switch (a.m) {
      case 1: return few<Long, Symmetric, 1>(a, row_begin, row_end, work);
      case 2: return few<Long, Symmetric, 2>(a, row_begin, row_end, work);
      case 3: return few<Long, Symmetric, 3>(a, row_begin, row_end, work);
      case 4: return few<Long, Symmetric, 4>(a, row_begin, row_end, work);
      case 5: return few<Long, Symmetric, 5>(a, row_begin, row_end, work);
      case 6: return few<Long, Symmetric, 6>(a, row_begin, row_end, work);
    }
    for (int64_t m = 0; m < a.m; m += batch_rows)
      many<Long, Symmetric>(a, m, m + batch_rows < a.m ? m + batch_rows : a.m, row_begin, row_end, work);
  }

  static void run(const epmq::WordMatmulArgs& a, int64_t row_begin, int64_t row_end, void* scratch) {
    const Work work = work_of(a, scratch);
    groups_of(a, work.groups);
    const bool whole = segment_of(a) == unit_steps;
    const auto zeros = whole ? panels<true, false> : panels<false, false>;
    const auto symmetric = whole ? panels<true, true> : panels<false, true>;
    return a.zeros ? zeros(a, row_begin, row_end, work) : symmetric(a, row_begin, row_end, work);
  }
};

}  // namespace

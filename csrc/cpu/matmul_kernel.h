// y = x * dequant(W)^T + bias with one order of summation whatever the batch. Included once per instruction set.
//
// The input features are cut into passes of `depth` codes. Within a pass every output is `lanes` partial sums, lane l
// taking one code of each step of the permuted order (kernels.h), step by step with one fused multiply-add each, then
// one fixed tree over the lanes; passes are added in order. All paths do exactly that, so a row's result has the same
// bits alone and in a batch:
//   one row of x    weights go from codes to registers and are used once (bound by memory);
//   more rows       weights of a panel of rows x one pass are decoded into the cache and used M times.
#pragma once

#include "decode.h"

namespace {

struct MatmulKernel {
  static constexpr int L = Vec::lanes, RM = Vec::inner_m, RN = Vec::inner_n;
  static constexpr int64_t depth = 512;         // codes per pass
  static constexpr int64_t sub_rows = 2 * RN;   // weight rows that stay in the first cache during a pass
  static constexpr int64_t single_rows = 16;   // weight rows together when x has one row
  static constexpr int64_t panel_rows = 96;    // weight rows decoded together for a large batch
  static constexpr int64_t batch_rows = 32;    // rows of x whose part of a pass stays in the second cache
  static constexpr int64_t slice_rows = 512;   // rows of x that share a decoded panel: their sums are a thread's memory
  static_assert(depth % kBlock == 0 && panel_rows % sub_rows == 0 && batch_rows % RM == 0 && slice_rows % RM == 0,
                "tiles must fill panels and slices");
  static_assert(RM == 4, "Vec::totals reduces four vectors");

  static int64_t blocks_of(const epmq::MatmulArgs& a) { return (a.k + kBlock - 1) / kBlock; }
  static bool whole_row(const epmq::MatmulArgs& a) { return a.group_size >= a.k; }
  static bool uniform(const epmq::MatmulArgs& a) { return whole_row(a) || a.group_size % kBlock == 0; }
  static bool fast(const epmq::MatmulArgs& a) { return a.bits == 4 && (whole_row(a) || a.group_size % kChunk == 0); }
  static int64_t units_of(const epmq::MatmulArgs& a) { return blocks_of(a) * (uniform(a) ? 1 : kBlockChunks); }
  // A small batch reads its panel back at once; a large one shares it between many rows of x.
  static int64_t panel_of(const epmq::MatmulArgs& a) { return a.m <= batch_rows ? sub_rows : panel_rows; }
  // Rows of x that sums are kept of at a time, in whole tiles.
  static int64_t padded_m(const epmq::MatmulArgs& a) { return ((a.m < slice_rows ? a.m : slice_rows) + RM - 1) / RM * RM; }

  // Per thread: groups of units, sums, decoded panel, converted scales.
  static int64_t scratch(const epmq::MatmulArgs& a) {
    const int64_t rows = panel_of(a);
    return units_of(a) + rows * padded_m(a) + rows * depth + single_rows * a.groups + 64;
  }

  // What every row of W shares: the group of each unit, and the zero point of a symmetric grid.
  struct Shared {
    const int32_t* groups;
    uint8_t middle;
    int64_t zero_mask;
  };

  template <bool Uniform>
  static Shared shared(const epmq::MatmulArgs& a, int32_t* groups) {
    constexpr int unit = Uniform ? kBlock : kChunk;
    for (int64_t u = 0; u * unit < a.k; u++) groups[u] = (int32_t)(u * unit / a.group_size);
    return {groups, (uint8_t)(1 << (a.bits - 1)), a.zeros ? -1 : 0};
  }

  template <bool Uniform>
  static EPMQ_INLINE Lookup<Uniform> lookup_of(const epmq::MatmulArgs& a, const Shared& common, RowGrid grid,
                                               int64_t block) {
    return Lookup<Uniform>(a.tables, grid, common.zero_mask, common.groups + block * (Uniform ? 1 : kBlockChunks));
  }

  // ---- activations ----------------------------------------------------------------------------------------------

  static void prepare(const epmq::MatmulArgs& a, int64_t tile_begin, int64_t tile_end) {
    const int64_t steps = blocks_of(a) * 8;
    int slots[kBlock];
    for (int at = 0; at < kBlock; at++) slots[at] = slot_of(at);
    for (int64_t t = tile_begin; t < tile_end; t++) {
      const int64_t rows = a.m - t * RM < RM ? a.m - t * RM : RM;
      float* tile = a.prepared + t * RM * steps * L;
      for (int64_t r = 0; r < rows; r++) {
        const int64_t row = (t * RM + r) * a.x_row_stride;
        for (int64_t block = 0; block < steps / 8; block++) {
          float values[kBlock];
          read_block(a, row, block * kBlock, values);
          float* out = tile + (block * 8 * rows + r) * L;
          for (int at = 0; at < kBlock; at++) out[slots[at] / L * rows * L + slots[at] % L] = values[at];
        }
      }
    }
  }

  static EPMQ_INLINE void read_block(const epmq::MatmulArgs& a, int64_t row, int64_t k, float* values) {
    if (a.x_column_stride == 1 && k + kBlock <= a.k) {
      for (int j = 0; j < 8; j++) read_vector(a.x, a.x_dtype, row + k + j * L).store(values + j * L);
    } else {
      for (int at = 0; at < kBlock; at++)
        values[at] = k + at < a.k ? read_element(a.x, a.x_dtype, row + (k + at) * a.x_column_stride) : 0.0f;
    }
  }

  // ---- one row of x ---------------------------------------------------------------------------------------------

  // One pass of R <= 4 weight rows: results[r] += w[r] * x. `ahead` bytes further lie the codes needed a pass later.
  template <bool Uniform, int R>
  static EPMQ_INLINE void single_pass(const epmq::MatmulArgs& a, int64_t row, int64_t from, int64_t to, int64_t ahead,
                                      const Shared& common, const RowGrid* row_grids, float* results) {
    const int64_t full = a.k / kBlock;  // blocks within the row
    const uint8_t* codes = a.packed + row * a.row_bytes;
    RowGrid grids[R];
    Vec sums[RM];
    EPMQ_UNROLL
    for (int r = 0; r < R; r++) grids[r] = row_grids[r];
    EPMQ_UNROLL
    for (int r = 0; r < RM; r++) sums[r] = Vec::zero();
    for (int64_t block = from; block < (to < full ? to : full); block++) {
      const float* x = a.prepared + block * kBlock;
      EPMQ_UNROLL
      for (int r = 0; r < R; r++) {
        const uint8_t* source = codes + r * a.row_bytes + block * (kBlock / 2);
        __builtin_prefetch(source + ahead);
        Vec w[8];
        lookup_of<Uniform>(a, common, grids[r], block).weights(source, w);
        EPMQ_UNROLL
        for (int j = 0; j < 8; j++) sums[r] = Vec::fma(w[j], Vec::load(x + j * L), sums[r]);
      }
    }
    if (to > full) {  // the end of the row
      const float* x = a.prepared + full * kBlock;
      EPMQ_UNROLL
      for (int r = 0; r < R; r++) {
        Vec w[8];
        decode_any(a, row + r, full, w);
        EPMQ_UNROLL
        for (int j = 0; j < 8; j++) sums[r] = Vec::fma(w[j], Vec::load(x + j * L), sums[r]);
      }
    }
    float totals[RM];
    Vec::totals(sums, totals);
    EPMQ_UNROLL
    for (int r = 0; r < R; r++) results[r] += totals[r];
  }

  // Rows in groups, pass by pass, so that x comes from the first cache for all but the first rows of a group.
  template <bool Uniform>
  static void single(const epmq::MatmulArgs& a, int64_t row_begin, int64_t row_end, float* scratch) {
    const Shared common = shared<Uniform>(a, (int32_t*)scratch);
    float* converted = scratch + units_of(a);
    const int64_t blocks = blocks_of(a), pass = depth / kBlock;
    for (int64_t row = row_begin; row < row_end; row += single_rows) {
      const int64_t rows = row_end - row < single_rows ? row_end - row : single_rows;
      RowGrid grids[single_rows];
      float results[single_rows] = {};
      for (int64_t r = 0; r < rows; r++) grids[r] = grid_of(a, row + r, converted + r * a.groups, &common.middle);
      for (int64_t from = 0; from < blocks; from += pass) {
        const int64_t to = from + pass < blocks ? from + pass : blocks;
        const int64_t ahead = to < blocks ? depth / 2 : single_rows * a.row_bytes - from * (kBlock / 2);
        int64_t r = 0;
        for (; r + RM <= rows; r += RM)
          single_pass<Uniform, RM>(a, row + r, from, to, ahead, common, grids + r, results + r);
        for (; r < rows; r++) single_pass<Uniform, 1>(a, row + r, from, to, ahead, common, grids + r, results + r);
      }
      for (int64_t r = 0; r < rows; r++) a.out[row + r] = a.bias ? results[r] + a.bias[row + r] : results[r];
    }
  }

  // ---- many rows of x -------------------------------------------------------------------------------------------

  // Blocks [from, to) of `rows` weight rows, in tiles: [tile][step][rows of the tile][lanes].
  template <bool Fast, bool Uniform>
  static void decode(const epmq::MatmulArgs& a, int64_t row, int64_t rows, int64_t from, int64_t to,
                     const Shared& common, float* converted, float* panel) {
    for (int64_t r = 0; r < rows; r++) {
      const int64_t height = height_at(r, rows), first = height == 1 ? r : r / RN * RN;
      float* out = panel + first * (to - from) * kBlock + (r - first) * L;
      const uint8_t* codes = a.packed + (row + r) * a.row_bytes;
      const RowGrid grid = Fast ? grid_of(a, row + r, converted, &common.middle) : RowGrid{};
      for (int64_t block = from; block < to; block++) {
        Vec w[8];
        if (Fast && (block + 1) * kBlock <= a.k) {
          __builtin_prefetch(codes + block * (kBlock / 2) + depth / 2);
          lookup_of<Uniform>(a, common, grid, block).weights(codes + block * (kBlock / 2), w);
        } else {
          decode_any(a, row + r, block, w);
        }
        EPMQ_UNROLL
        for (int j = 0; j < 8; j++) w[j].store(out + j * height * L);
        out += 8 * height * L;
      }
    }
  }

  // sums[n][m] += x tile * weight tile over `steps`.
  template <int M, int N>
  static void tile(int64_t steps, const float* x, const float* w, float* sums, int64_t sums_stride) {
    Vec acc[N][RM];
    EPMQ_UNROLL
    for (int n = 0; n < N; n++)
      EPMQ_UNROLL
      for (int m = 0; m < RM; m++) acc[n][m] = Vec::zero();
    for (int64_t s = 0; s < steps; s++) {
      Vec b[N];
      EPMQ_UNROLL
      for (int n = 0; n < N; n++) b[n] = Vec::load(w + n * L);
      EPMQ_UNROLL
      for (int m = 0; m < M; m++) {
        const Vec v = Vec::load(x + m * L);
        EPMQ_UNROLL
        for (int n = 0; n < N; n++) acc[n][m] = Vec::fma(b[n], v, acc[n][m]);
      }
      x += M * L;
      w += N * L;
    }
    EPMQ_UNROLL
    for (int n = 0; n < N; n++) {
      float totals[RM];
      Vec::totals(acc[n], totals);
      EPMQ_UNROLL
      for (int m = 0; m < RM; m++) sums[n * sums_stride + m] += totals[m];
    }
  }

  template <int M>
  static void tile_of(int64_t height, int64_t steps, const float* x, const float* w, float* sums, int64_t stride) {
    if (height == RN) return tile<M, RN>(steps, x, w, sums, stride);
    // The last rows of W, one at a time.
    return tile<M, 1>(steps, x, w, sums, stride);
  }

  static void tile_any(int64_t count, int64_t height, int64_t steps, const float* x, const float* w, float* sums,
                       int64_t stride) {
    switch (count) {
      case 4: return tile_of<4>(height, steps, x, w, sums, stride);
      case 3: return tile_of<3>(height, steps, x, w, sums, stride);
      case 2: return tile_of<2>(height, steps, x, w, sums, stride);
      default: return tile_of<1>(height, steps, x, w, sums, stride);
    }
  }

  // One pass over the codes: `rows` decoded weight rows against rows [first, end_m) of x.
  static void multiply(const epmq::MatmulArgs& a, int64_t rows, int64_t first, int64_t end_m, int64_t from, int64_t to,
                       const float* weights, float* sums) {
    const int64_t row_floats = blocks_of(a) * kBlock, steps = (to - from) * 8, stride = padded_m(a);
    for (int64_t batch = first; batch < end_m; batch += batch_rows) {
      const int64_t last = batch + batch_rows < end_m ? batch + batch_rows : end_m;
      for (int64_t sub = 0; sub < rows; sub += sub_rows) {
        const int64_t end = sub + sub_rows < rows ? sub + sub_rows : rows;
        for (int64_t m = batch; m < last; m += RM) {
          const int64_t count = a.m - m < RM ? a.m - m : RM;
          const float* x = a.prepared + m * row_floats + from * kBlock * count;
          for (int64_t n = sub; n < end; n += height_at(n, rows))
            tile_any(count, height_at(n, rows), steps, x, weights + n * steps * L,
                     sums + n * stride + m - first, stride);
        }
      }
    }
  }

  // Tiles of weight rows: RN high, and single rows at the end.
  static EPMQ_INLINE int64_t height_at(int64_t n, int64_t rows) { return n / RN * RN + RN <= rows ? RN : 1; }

  template <bool Fast, bool Uniform>
  static void many(const epmq::MatmulArgs& a, int64_t row_begin, int64_t row_end, float* scratch) {
    const int64_t height = panel_of(a), stride = padded_m(a), blocks = blocks_of(a), pass = depth / kBlock;
    const Shared common = shared<Uniform>(a, (int32_t*)scratch);
    float* sums = scratch + units_of(a);
    float* weights = sums + height * stride;
    float* converted = weights + height * depth;
    for (int64_t row = row_begin; row < row_end; row += height) {
      const int64_t rows = row_end - row < height ? row_end - row : height;
      for (int64_t first = 0; first < a.m; first += slice_rows) {
        const int64_t last = first + slice_rows < a.m ? first + slice_rows : a.m;
        memset(sums, 0, sizeof(float) * (size_t)(rows * stride));
        for (int64_t from = 0; from < blocks; from += pass) {
          const int64_t to = from + pass < blocks ? from + pass : blocks;
          decode<Fast, Uniform>(a, row, rows, from, to, common, converted, weights);
          multiply(a, rows, first, last, from, to, weights, sums);
        }
        for (int64_t m = first; m < last; m++)
          for (int64_t r = 0; r < rows; r++) {
            const float sum = sums[r * stride + m - first];
            a.out[m * a.n + row + r] = a.bias ? sum + a.bias[row + r] : sum;
          }
      }
    }
  }

  static void run(const epmq::MatmulArgs& a, int64_t row_begin, int64_t row_end, float* scratch) {
    if (!fast(a)) return many<false, true>(a, row_begin, row_end, scratch);
    const auto one = uniform(a) ? single<true> : single<false>;
    const auto more = uniform(a) ? many<true, true> : many<true, false>;
    return a.m == 1 ? one(a, row_begin, row_end, scratch) : more(a, row_begin, row_end, scratch);
  }
};

}  // namespace

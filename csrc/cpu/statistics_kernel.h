// Packing of a batch and the products of its columns. Included once per instruction set.
#pragma once

#include "kernels.h"
#include "read.h"

namespace {

struct StatisticsKernel {
  static constexpr int B = Vec::outer_b, V = Vec::outer_v, L = Vec::lanes;
  static_assert(L % B == 0, "a step of B rows must not straddle two packed tiles");

  // Tiles [tile_begin, tile_end) of packed columns. Row by row, so that memory is read in order.
  static void pack(const epmq::PackArgs& a, int64_t tile_begin, int64_t tile_end) {
    constexpr int64_t strip = 16;  // tiles whose sums are carried together
    for (int64_t first = tile_begin; first < tile_end; first += strip) {
      const int64_t last = first + strip < tile_end ? first + strip : tile_end;
      for (int64_t part = 0; part < a.kept; part += epmq::kPackDepth) {
        const int64_t steps = steps_of(a.kept, part);
        Vec sums[strip];
        for (int64_t t = first; t < last; t++) sums[t - first] = Vec::zero();
        for (int64_t m = part; m < part + steps; m++) {
          const int64_t row = a.rows[m] * a.row_stride;
          const Vec weight = Vec::broadcast(a.weights ? a.weights[m] : 1.0f);
          for (int64_t t = first; t < last; t++) {
            const Vec value = read(a, row, t);
            const int64_t place = (part * a.tiles + t * steps + m - part) * L;
            if (a.plain) value.store(a.plain + place);
            const Vec scaled = a.weights ? value * weight : value;
            if (a.weighted) scaled.store(a.weighted + place);
            sums[t - first] = sums[t - first] + scaled;
          }
        }
        for (int64_t t = first; a.sum && t < last; t++) {
          float lanes[L];
          sums[t - first].store(lanes);
          add(a.sum, t * L, lanes, a.columns - t * L < L ? a.columns - t * L : L);
        }
      }
    }
  }

  static EPMQ_INLINE void add(epmq::Sum sum, int64_t at, const float* values, int64_t count) {
    if (sum.wide)
      for (int64_t i = 0; i < count; i++) sum.wide[at + i] += (double)values[i];
    else
      for (int64_t i = 0; i < count; i++) sum.narrow[at + i] += values[i];
  }

  static EPMQ_INLINE Vec read(const epmq::PackArgs& a, int64_t row, int64_t t) {
    if (a.column_stride == 1 && t * L + L <= a.columns) return read_vector(a.data, a.dtype, row + t * L);
    float lanes[L];
    for (int l = 0; l < L; l++)
      lanes[l] = t * L + l < a.columns ? read_element(a.data, a.dtype, row + (t * L + l) * a.column_stride) : 0.0f;
    return Vec::load(lanes);
  }

  // Rows a few at a time, so that the right-hand columns of a rectangle stay in the first cache.
  static void product(const epmq::ProductArgs& a) {
    for (int64_t part = 0; part < a.kept; part += epmq::kPackDepth) product_part(a, part, steps_of(a.kept, part));
  }

  static EPMQ_INLINE int64_t steps_of(int64_t kept, int64_t part) {
    return kept - part < epmq::kPackDepth ? kept - part : epmq::kPackDepth;
  }

  static void product_part(const epmq::ProductArgs& a, int64_t part, int64_t steps) {
    const int64_t panel = steps * L;  // floats per packed tile
    const float* left = a.left + part * a.left_tiles * L;
    const float* right = a.right + part * a.right_tiles * L + a.column_begin / L * panel;
    for (int64_t i = a.row_begin; i < a.row_end; i += B) {
      const int64_t rows = a.row_end - i < B ? a.row_end - i : B;
      const int64_t at = i * a.out_stride + a.column_begin;
      for (int64_t b = 0; a.out.narrow && b < rows; b++)
        for (int v = 0; v < V * L; v += 16) __builtin_prefetch(a.out.narrow + at + b * a.out_stride + v, 1);
      OuterTile<B, V> sum;
      sum.clear();
      sum.add(steps, left + i / L * panel + i % L, L, right, L, panel);
      if (a.out.narrow && rows == B && a.column_begin + V * L <= a.column_end) {
        EPMQ_UNROLL
        for (int b = 0; b < B; b++)
          EPMQ_UNROLL
          for (int v = 0; v < V; v++) {
            float* place = a.out.narrow + at + b * a.out_stride + v * L;
            (Vec::load(place) + sum.acc[b][v]).store(place);
          }
      } else {
        float edge[B][V * L];
        EPMQ_UNROLL
        for (int b = 0; b < B; b++)
          EPMQ_UNROLL
          for (int v = 0; v < V; v++) sum.acc[b][v].store(&edge[b][v * L]);
        const int64_t width = a.column_end - a.column_begin < V * L ? a.column_end - a.column_begin : V * L;
        for (int64_t b = 0; b < rows; b++) add(a.out, at + b * a.out_stride, edge[b], width);
      }
    }
  }
};

}  // namespace

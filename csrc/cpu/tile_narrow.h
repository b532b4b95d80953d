// The product of tile_matmul.h, in the same order of summation, for a batch whose columns fit one tile.
//
// Memory decides its time, so nothing but codes may be waited for: a unit of 32 weight rows is decoded, multiplied and
// scaled while codes and grids of the rows that come next are on their way, in the order of memory.
#pragma once

#include "tile_matmul.h"

namespace {

struct TileNarrow {
  using Wide = TileMatmul;
  static constexpr int64_t blocks = 2;                       // of 16 weight rows: one accumulator each
  static constexpr int64_t group_rows = blocks * kTileRows;  // weight rows together
  static constexpr int64_t block_words = Wide::unit_steps * kTileWords;

  struct Work {
    int32_t* groups;    // [segments]: the group of each
    float* scales;      // [blocks][G][16]
    float* sums;        // [blocks][16][width]
    float* products;    // [blocks][16][width]
    uint16_t* weights;  // [blocks][steps of a unit][16][32]
    int64_t bytes;      // of all of these
  };

  static Work work_of(const epmq::TileMatmulArgs& a, void* scratch) {
    const int64_t tile = kTileRows * a.width;
    Scratch take{(char*)scratch};
    Work work;
    work.weights = (uint16_t*)take(blocks * block_words * 2);
    work.products = (float*)take(blocks * tile * 4);
    work.sums = (float*)take(blocks * tile * 4);
    work.scales = (float*)take(blocks * a.groups * kTileRows * 4);
    work.groups = (int32_t*)take(Wide::units_of(a) * Wide::unit_steps * 4);
    work.bytes = take.at - (char*)scratch;
    return work;
  }

  static int64_t scratch(const epmq::TileMatmulArgs& a) { return work_of(a, nullptr).bytes; }

  template <bool Long, bool Symmetric>
  static void rows(const epmq::TileMatmulArgs& a, int64_t row_begin, int64_t row_end, void* scratch) {
    const Work work = work_of(a, scratch);
    const int64_t units = Wide::units_of(a), steps = Long ? Wide::unit_steps : Wide::segment_of(a);
    const int64_t tile = kTileRows * a.width, line = Wide::unit / 2;
    Wide::groups_of(a, work.groups);
    const Wide::Owners owners(a.width);
    const TileScope scope(a.width);
    for (int64_t row = row_begin; row < row_end; row += group_rows) {
      for (int64_t b = 0; b < blocks; b++)
        Wide::read_scales(a, row + b * kTileRows, work.scales + b * a.groups * kTileRows);
      memset(work.sums, 0, sizeof(float) * (size_t)(blocks * tile));
      const uint8_t* next = a.packed + (row + group_rows) * a.row_bytes;
      Wide::GridFetch grids(a, row + group_rows, group_rows);
      const uint16_t* columns = a.columns;
      const int32_t* group = work.groups;
      for (int64_t u = 0; u < units; u++) {
        grids.step();
        for (int64_t b = 0; b < blocks; b++, next += kTileRows * line)
          Wide::decode<Long, Symmetric>(a, row + b * kTileRows, u, u + 1, work.groups, next,
                                        work.weights + b * block_words);
        for (int64_t s = 0; s < Wide::unit_steps; s += steps, columns += steps * kTileDepth * a.width, group++) {
          clear_tiles<1>();
          multiply_tiles<1>(steps, work.weights + s * kTileWords, block_words, columns, 0, a.width);
          store_tiles<1>(work.products, a.width);
          for (int64_t b = 0; b < blocks; b++)
            Wide::scale(a.width, owners.rows, work.scales + (b * a.groups + *group) * kTileRows,
                        work.products + b * tile, work.sums + b * tile);
        }
      }
      for (int64_t b = 0; b < blocks && row + b * kTileRows < row_end; b++)
        Wide::finish(a, row + b * kTileRows, 0, 0, a.m, work.sums + b * tile);
    }
  }

  static void run(const epmq::TileMatmulArgs& a, int64_t row_begin, int64_t row_end, void* scratch) {
    const bool whole = Wide::segment_of(a) == Wide::unit_steps;
    const auto zeros = whole ? rows<true, false> : rows<false, false>;
    const auto symmetric = whole ? rows<true, true> : rows<false, true>;
    return a.zeros ? zeros(a, row_begin, row_end, scratch) : symmetric(a, row_begin, row_end, scratch);
  }
};

}  // namespace
